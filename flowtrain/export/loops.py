"""The inverse of an autoregressive layer as a loop, for a program that would be too long with each element in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop_op
from torch.func import functional_call

from flowtrain.bijections.autoregressive import Autoregressive
from flowtrain.bijections.bijection import Bijection, walk

LONGEST = 32  # elements, of all layers, that are written out one after the other


def count_steps(bijection: Bijection, inverse: bool) -> int:
    """The elements that autoregressive layers find one after the other, in ``forward`` or ``inverse``."""
    layers = [layer for layer, inverted in walk(bijection) if isinstance(layer, Autoregressive) and inverted != inverse]
    return sum(layer.shape[0] for layer in layers)


@contextmanager
def as_loops(bijection: Bijection) -> Iterator[None]:
    """Within it, autoregressive layers are inverted by a loop, which torch.export and ONNX have an operator for."""
    layers = [layer for layer, _ in walk(bijection) if isinstance(layer, Autoregressive)]
    for layer in layers:
        vars(layer)["inverse"] = _Loop(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["inverse"]


class _Loop:
    """``inverse`` by iteration to the fixed point of x = τ⁻¹(z; net(x)).

    The first i elements are right after i passes of the network, whatever the others are: that is exact after D passes,
    and stops at the first that changes nothing.
    """

    def __init__(self, layer: Autoregressive):
        self.layer = layer
        self.names, self.weights = zip(*layer.net.named_parameters(), *layer.net.named_buffers())

    def __call__(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layer, given = self.layer, [] if context is None else [context]
        z = layer._sort(z)
        start = torch.zeros((), dtype=torch.int64), torch.zeros_like(z), torch.ones((), dtype=torch.bool)
        more = [z, *given, *(weight.detach() for weight in self.weights)]
        _, x, _ = while_loop_op(self._goes_on, self._pass, start, tuple(more))
        x, log_derivative = self._map(x, *more)
        return layer._unsort(x), log_derivative.sum(1)

    def _goes_on(self, i, x, changed, *more):
        return (i < self.layer.shape[0]) & changed

    def _pass(self, i, x, changed, *more):
        new, _ = self._map(x, *more)
        return i + 1, new, (new != x).any()

    def _map(self, x: Tensor, z: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """τ⁻¹(z; net(x)). Elements that are not right yet may be infinite, which times a weight of 0 would not be 0."""
        context, weights = given[: -len(self.names)], given[-len(self.names) :]
        x = torch.where(x.isfinite(), x, 0.0)
        theta = functional_call(self.layer.net, dict(zip(self.names, weights)), (x, *context)).to(z.dtype)
        return self.layer.univariate.inverse(z, theta)
