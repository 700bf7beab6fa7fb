"""The exponential moving average of a model's parameters, which is what gets validated and sampled."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """``model`` averages ``live``'s parameters and copies its buffers.

    The decay rises to its final value as (1 + n)/(10 + n), so that a short run is not an average of its start.
    """

    def __init__(self, live: nn.Module, decay: float):
        self.live, self.decay = live, decay
        self.model = copy.deepcopy(live).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(self.live.parameters()), 1 - decay)
        for mine, live in zip(self.model.buffers(), self.live.buffers()):
            mine.copy_(live)
