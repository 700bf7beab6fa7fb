"""Autoregressive maps: each element is mapped with parameters that the elements before it set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from flowtrain.bijections.base import Bijection, full_precision, sum_event
from flowtrain.bijections.univariate import Univariate


class Autoregressive(Bijection):
    """zᵢ = τ(xᵢ; net(x₁ … xᵢ₋₁)) for a vector (Papamakarios et al. 2017, section 3.1).

    ``net`` is built as ``net(shape=…, out=parameters per element, context_shape=…)``. It gives the parameters of all
    elements at once, ``(B, D, out)``, and one after the other by ``begin()`` and ``step(x, memory)``, where x holds the
    elements so far; the inverse goes through them once, each step at the cost of one element.
    """

    def __init__(self, shape, univariate: Callable[..., Univariate], net: Callable[..., nn.Module], context_shape=None):
        super().__init__(shape, context_shape)
        if len(self.shape) != 1:
            raise ValueError(f"an autoregressive layer takes vectors, not {list(self.shape)}; flatten first")
        self.univariate = univariate(shape=self.shape)
        if list(self.univariate.parameters()):  # those belong to elements, and the inverse maps one at a time
            raise ValueError(f"{type(self.univariate).__name__} has weights of its own; an autoregressive map takes none")
        self.net = net(shape=self.shape, out=self.univariate.params, context_shape=context_shape)

    def forward(self, x, context=None):
        theta = self.net(x, context).to(x.dtype)
        with full_precision(x):
            z, log_derivative = self.univariate(x, theta)
            return z, sum_event(log_derivative)

    def inverse(self, z, context=None):
        memory = self.net.begin()
        elements, log_derivatives = [], []
        for column in z.unbind(1):
            so_far = torch.stack(elements, 1) if elements else z[:, :0]
            theta = self.net.step(so_far, memory, context).to(z.dtype)
            with full_precision(z):
                element, log_derivative = self.univariate.inverse(column, theta)
            elements.append(element)
            log_derivatives.append(log_derivative)
        return torch.stack(elements, 1), sum_event(torch.stack(log_derivatives, 1))
