"""Maps of each element alone, with learned parameters or with parameters that a context sets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from flowtrain.bijections.bijection import Bijection, full_precision, sum_event
from flowtrain.bijections.univariate import Univariate, per_element


class Elementwise(Bijection):
    """zᵢ = τ(xᵢ; θᵢ) with learned θ, zero at the start.

    Args:
        shape: of one event.
        univariate: factory of τ, called with ``shape``.
        share: axes of the event along which elements share θ: [1, 2] gives an image one θ for each channel.
        context_shape: not used.

    >>> from flowtrain import bijections as b
    >>> b.Elementwise((3, 8, 8), b.RationalQuadratic, share=[1, 2])(torch.rand(5, 3, 8, 8))[0].shape
    torch.Size([5, 3, 8, 8])
    """

    reversible = True

    def __init__(self, shape, univariate: Callable[..., Univariate], share=(), context_shape=None):
        super().__init__(shape, context_shape)
        self.univariate = univariate(shape=self.shape)
        sizes = [1 if axis in share else n for axis, n in enumerate(self.shape)]
        self.theta = nn.Parameter(torch.zeros(*sizes, self.univariate.params))

    def forward(self, x, context=None):
        z, log_derivative = self.log_derivatives(x)
        return z, sum_event(log_derivative)

    def log_derivatives(self, x, context=None):
        return self.univariate(x, self.theta.expand(*self.shape, -1))

    def inverse(self, z, context=None):
        x, log_derivative = self.univariate.inverse(z, self.theta.expand(*self.shape, -1))
        return x, sum_event(log_derivative)

    def exact_inputs(self, x):
        return () if self.univariate.smooth else (x,)


class Conditional(Bijection):
    """zᵢ = τ(xᵢ; θᵢ) with θ = net(context).

    As the split prior of a multi-scale flow, with ``ExpAffine`` and a ``ZeroConv``, it is Glow's learned prior of the
    half that is split off, given the half that stays (Kingma & Dhariwal 2018, reference code).

    Args:
        shape: of one event.
        univariate: factory of τ, called with ``shape``.
        net: factory ``net(shape=context_shape, out=…)`` of a network (B, *context_shape) -> (B, out, …).
        context_shape: of the context.

    Raises:
        ValueError: no ``context_shape``.

    >>> from flowtrain import bijections as b, nets
    >>> prior = b.Conditional((2, 4, 4), b.ExpAffine, nets.ZeroConv, context_shape=(3, 4, 4))
    >>> prior(torch.randn(5, 2, 4, 4), torch.randn(5, 3, 4, 4))[0].shape
    torch.Size([5, 2, 4, 4])
    """

    reversible = True

    def __init__(self, shape, univariate: Callable[..., Univariate], net: Callable[..., nn.Module], context_shape=None):
        super().__init__(shape, context_shape)
        if context_shape is None:
            raise ValueError("a conditional layer needs a context; nothing here gives one")
        self.univariate = univariate(shape=self.shape)
        self.net = net(shape=context_shape, out=self.shape[0] * self.univariate.params)

    def forward(self, x, context=None):
        return self._map(self.univariate, x, self._theta(x, context))

    def log_derivatives(self, x, context=None):
        theta = self._theta(x, context)
        with full_precision(x):
            return self.univariate(x, theta)

    def inverse(self, z, context=None):
        return self._map(self.univariate.inverse, z, self._theta(z, context))

    def exact_inputs(self, x):
        return () if self.univariate.smooth else (x,)

    def recompute(self, z, context=None, restore=lambda part: part):
        """With one evaluation of the network, so that its dropout is the same in both directions."""
        theta = self._theta(z, context)
        with torch.no_grad():
            x = restore(self._map(self.univariate.inverse, z, theta)[0])
        leaf = x.detach().requires_grad_()
        return x, leaf, *self._map(self.univariate, leaf, theta)

    def _theta(self, x, context):
        return per_element(self.net(context).to(x.dtype), self.univariate.params)

    def _map(self, univariate, x, theta):
        with full_precision(x):
            x, log_derivative = univariate(x, theta)
            return x, sum_event(log_derivative)
