"""A batch of training examples."""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Examples x (B, *shape), their context (B, *context_shape) or None, their weights (B,) or None if all are one."""

    x: Tensor
    context: Tensor | None = None
    weights: Tensor | None = None

    def chunk(self, parts: int) -> list[Batch]:
        """At most ``parts`` batches of consecutive examples, as ``Tensor.chunk`` divides them."""
        return [Batch(*each) for each in zip_longest(*(() if one is None else one.chunk(parts) for one in self))]

    def to(self, device) -> Batch:
        return Batch(*(None if one is None else one.to(device) for one in self))
