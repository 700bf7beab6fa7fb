"""The inverse of an autoregressive layer as a loop, for a program that would be too long with each element in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop_op
from torch.func import functional_call, vjp

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
        vars(layer)["inverse"] = (_ElementLoop if layer.univariate.iterative else _FixedPointLoop)(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["inverse"]


class _Map(nn.Module):
    """τ ("forward") or τ⁻¹ ("inverse") of elements, all or those at places, with their parameters in net(x)."""

    def __init__(self, layer: Autoregressive):
        super().__init__()
        self.net, self.univariate = layer.net, layer.univariate

    def forward(self, direction, elements, x, *context, places=None):
        theta = self.net(x, *context).to(x.dtype)
        return getattr(self.univariate, direction)(elements, theta if places is None else theta.index_select(1, places))


class _Loop:
    """``inverse`` of a layer, in passes of the whole network."""

    def __init__(self, layer: Autoregressive):
        self.layer, self.map = layer, _Map(layer)
        self.names, self.weights = zip(*self.map.named_parameters(), *self.map.named_buffers())

    def __call__(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, given = self.layer._sort(z), [] if context is None else [context]
        given += self.weights
        with torch.no_grad():
            x = self._find(z, given)
        if torch.is_grad_enabled():
            solution, x = x, x + (z - z.detach())
            x.register_hook(lambda gradient: self._solve(gradient, solution, given))
        _, log_derivative = self._apply("forward", x, x, given)
        return self.layer._unsort(x), -log_derivative.sum(1)

    def _to_fixed_point(self, step: Callable[..., Tensor], start: Tensor, *given: Tensor) -> Tensor:
        """What ``step(i, x, *given)`` makes of x in D steps, or in as many as change it."""

        def goes_on(i, x, changed, *given):
            return (i < self.layer.shape[0]) & changed

        def one(i, x, changed, *given):
            new = step(i, x, *given)
            return i + 1, new, (new != x).any()

        begin = torch.zeros((), dtype=torch.int64), start, torch.ones((), dtype=torch.bool)
        return while_loop_op(goes_on, one, begin, given)[1]

    def _apply(self, direction: str, elements: Tensor, x: Tensor, given, **kwargs) -> tuple[Tensor, Tensor]:
        context, weights = given[: -len(self.names)], given[-len(self.names) :]
        return functional_call(self.map, dict(zip(self.names, weights)), (direction, elements, x, *context), kwargs)

    def _find(self, z: Tensor, given) -> Tensor:
        """x of z."""
        raise NotImplementedError

    def _solve(self, gradient: Tensor, x: Tensor, given) -> Tensor:
        """The gradient in z of what has this gradient in x: u of u·J = gradient, with the triangular Jacobian J of
        z = τ(x; net(x)), in the same iteration."""

        def step(i, u, gradient, x, *given):
            _, multiply, log_derivative = vjp(lambda x: self._apply("forward", x, x, given), x, has_aux=True)
            (product,) = multiply(u)
            diagonal = log_derivative.exp()
            return (gradient - (product - diagonal * u)) / diagonal

        with torch.no_grad():
            return self._to_fixed_point(step, torch.zeros_like(gradient), gradient, x, *given)


class _FixedPointLoop(_Loop):
    """By iteration to the fixed point of x = τ⁻¹(z; net(x)) (Song et al. 2021).

    The first i elements are right after i passes of the network, whatever the others are: that is exact after D passes,
    and stops at the first that changes nothing.
    """

    def _find(self, z, given):
        def step(i, x, z, *given):
            x = torch.where(x.isfinite(), x, 0.0)  # not right yet: infinity times a weight of 0 would not be 0
            return self._apply("inverse", z, x, given)[0]

        return self._to_fixed_point(step, torch.zeros_like(z), z, *given)


class _ElementLoop(_Loop):
    """One element after the other: D passes of the network, each with τ⁻¹ of one element, for a τ⁻¹ that is costly."""

    def _find(self, z, given):
        (n,) = self.layer.shape

        def step(i, x, z, *given):
            places = i.reshape(1)
            element, _ = self._apply("inverse", z.index_select(1, places), x, given, places=places)
            return i + 1, torch.where(torch.arange(n) == i, element, x)

        start = torch.zeros((), dtype=torch.int64), torch.zeros_like(z)
        return while_loop_op(lambda i, *_: i < n, step, start, (z, *given))[1]
