"""Optimizers of torch that do not import its compiler.

torch shields their methods from torch.compile. The first call of one imports the compiler, which takes seconds of a run
that compiles nothing. What a run compiles are layers of its flow, and never an optimizer.
"""

from __future__ import annotations

from inspect import unwrap

import torch

OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
SHIELDED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def _unshielded(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of ``kind`` that does the same."""
    methods = {name: unwrap(getattr(kind, name)) for name in SHIELDED}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(unwrap(kind.step))})


UNSHIELDED = {kind: _unshielded(kind) for kind in OPTIMIZERS}
