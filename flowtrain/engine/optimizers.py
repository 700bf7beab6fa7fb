"""Optimizers of torch that do not import its compiler.

torch shields their methods from torch.compile. The first call of one imports the compiler, which takes seconds of a run
that compiles nothing. What a run compiles are layers of its flow, and never an optimizer.
"""

from __future__ import annotations

from inspect import unwrap

import torch

SHIELDED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def _unshielded(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of ``kind`` that does the same, for an optimizer without ``differentiable``."""
    methods = {name: unwrap(getattr(kind, name)) for name in SHIELDED}
    methods |= {"step": torch.no_grad()(unwrap(kind.step)), "__module__": __name__}  # where pickle finds it
    return type(kind.__name__, (kind,), methods)


Adam = _unshielded(torch.optim.Adam)
AdamW = _unshielded(torch.optim.AdamW)
SGD = _unshielded(torch.optim.SGD)
UNSHIELDED = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW, torch.optim.SGD: SGD}
