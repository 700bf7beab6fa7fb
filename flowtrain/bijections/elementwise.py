"""Maps of each element by itself: with parameters of its own, or with parameters that a context sets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from flowtrain.bijections.bijection import Bijection, full_precision, sum_event
from flowtrain.bijections.univariate import Univariate, per_element


class Elementwise(Bijection):
    """Every element through ``univariate`` with learned parameters, zero at the start.

    ``share`` lists the axes of the event along which parameters are shared: [1, 2] gives an image one set for each
    channel.
    """

    def __init__(self, shape, univariate: Callable[..., Univariate], share=(), context_shape=None):
        super().__init__(shape, context_shape)
        self.univariate = univariate(shape=self.shape)
        sizes = [1 if axis in share else n for axis, n in enumerate(self.shape)]
        self.theta = nn.Parameter(torch.zeros(*sizes, self.univariate.params))

    def forward(self, x, context=None):
        z, log_derivative = self.univariate(x, self.theta.expand(*self.shape, -1))
        return z, sum_event(log_derivative)

    def inverse(self, z, context=None):
        x, log_derivative = self.univariate.inverse(z, self.theta.expand(*self.shape, -1))
        return x, sum_event(log_derivative)

    def clues(self, x):
        return () if self.univariate.smooth else (x,)


class Conditional(Bijection):
    """Every element through ``univariate`` with parameters that ``net`` makes from the context alone.

    As the exit of a multi-scale flow, whose context is the half that stays, with ``ExpAffine`` and one zero-initialised
    convolution it is Glow's learned prior of the half that leaves (Kingma & Dhariwal 2018, reference code).
    """

    def __init__(self, shape, univariate: Callable[..., Univariate], net: Callable[..., nn.Module], context_shape=None):
        super().__init__(shape, context_shape)
        if context_shape is None:
            raise ValueError("a conditional layer needs a context; nothing here gives one")
        self.univariate = univariate(shape=self.shape)
        self.net = net(shape=context_shape, out=self.shape[0] * self.univariate.params)

    def forward(self, x, context=None):
        return self._map(self.univariate, x, context)

    def inverse(self, z, context=None):
        return self._map(self.univariate.inverse, z, context)

    def _map(self, univariate, x, context):
        theta = per_element(self.net(context).to(x.dtype), self.univariate.params)
        with full_precision(x):
            x, log_derivative = univariate(x, theta)
            return x, sum_event(log_derivative)
