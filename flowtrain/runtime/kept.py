"""What follows from weights alone, such as the inverse of a matrix: computed once for all batches of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from flowtrain.runtime import modes

T = TypeVar("T")


def keep() -> AbstractContextManager[None]:
    """Within it, and where gradients are off, :func:`from_weights` computes a result once."""
    return modes.using(kept={})


def from_weights(compute: Callable[[], T], name: object, *layers: nn.Module) -> T:
    """``compute()``, the result called ``name`` of the weights of ``layers``. One that is kept is used until a weight
    is replaced or changed in place; only a change behind autograd's back, through ``.data``, is not seen."""
    kept = modes.current().kept
    if kept is None or torch.is_grad_enabled():
        return compute()
    key = name, *layers
    tensors = [*chain.from_iterable(chain(layer.parameters(), layer.buffers()) for layer in layers)]
    versions = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
    found = kept.get(key)
    if found is None or [*map(id, found[0])] != [*map(id, tensors)] or found[1] != versions:
        found = kept[key] = tensors, versions, compute()
    return found[2]
