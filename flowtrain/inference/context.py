"""A flow that takes contexts in their own units."""

from __future__ import annotations

from torch import Tensor, nn

from flowtrain.flow import Flow


class StandardizeContext(nn.Module):
    """(c − mean)/std of contexts c (B, C)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, context: Tensor) -> Tensor:
        return (context - self.mean) / self.std


def take_raw_contexts(flow: Flow, moments: Tensor) -> None:
    """From now on, ``flow``, which takes standardized contexts, takes them in the units of ``moments``: mean and
    standard deviation, (2, C)."""
    standardize = StandardizeContext(*moments.to(next(flow.parameters())).unbind())
    flow.embedding = standardize if flow.embedding is None else nn.Sequential(standardize, flow.embedding)
