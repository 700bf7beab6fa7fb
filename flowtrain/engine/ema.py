"""The exponential moving average of a model's parameters, which is what gets validated and sampled."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """``model`` averages ``live``'s parameters and copies its buffers.

    The decay rises to its final value as (1 + n)/(10 + n), so that a short run is not an average of its start.
    """

    def __init__(self, live: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(live).requires_grad_(False).eval()
        # to find these takes as long as to average them
        self.parameters = [*self.model.parameters()], [*live.parameters()]
        pairs = zip(self.model.modules(), live.modules())
        self.modules = [(mine, theirs) for mine, theirs in pairs if theirs._buffers]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self.parameters, 1 - decay)
        alike: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for module, live in self.modules:
            for mine, buffer in zip(module._buffers.values(), live._buffers.values()):
                if mine is not None and buffer is not None:
                    alike.setdefault(mine.dtype, []).append((mine, buffer))
        for pairs in alike.values():  # a GPU copies all tensors of a dtype at once
            torch._foreach_copy_(*map(list, zip(*pairs)))
