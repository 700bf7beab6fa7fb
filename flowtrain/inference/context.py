"""A flow that takes contexts in their own units."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections import Bijection
from flowtrain.distributions import ConditionalNormal
from flowtrain.flow import Flow


class StandardizedContext(Bijection):
    """``bijection``, given (c − mean)/std in place of a context c (C,)."""

    container = True
    mean: Tensor
    std: Tensor

    def __init__(self, bijection: Bijection, mean: Tensor, std: Tensor):
        super().__init__(bijection.shape, bijection.context_shape)
        self.bijection, self.out_shape = bijection, bijection.out_shape
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x, context=None):
        return self.bijection(x, self._standardize(context))

    def inverse(self, z, context=None):
        return self.bijection.inverse(z, self._standardize(context))

    def _standardize(self, context: Tensor) -> Tensor:
        return (context - self.mean) / self.std


@torch.no_grad()
def take_raw_contexts(flow: Flow, moments: Tensor) -> None:
    """From now on, ``flow``, which takes standardized contexts, takes them in the units of ``moments``: mean and
    standard deviation, (2, C)."""
    mean, std = moments.to(next(flow.parameters())).unbind()
    flow.bijection = StandardizedContext(flow.bijection, mean, std)
    for base in flow.base.modules():
        if isinstance(base, ConditionalNormal):
            base.affine.weight /= std
            base.affine.bias -= base.affine.weight @ mean
