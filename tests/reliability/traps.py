"""A layer and a data set that make a number not finite after some training steps."""

import inspect
import math
from collections.abc import Callable

import torch

from flowtrain import flows
from flowtrain.bijections import Bijection
from flowtrain.data import Moons

EDGE = 0.5  # examples whose first number is larger are affected


class Trap(Bijection):
    """The identity for ``after`` training passes; then fails in one of the ``WAYS`` for examples whose first number is
    above ``EDGE``."""

    def __init__(self, shape, way: str, value: float = math.nan, after: int = 5, context_shape=None):
        super().__init__(shape, context_shape)
        self.way, self.value, self.after = way, value, after
        self.register_buffer("passed", torch.zeros(()))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, context=None):
        if self.training and torch.is_grad_enabled():
            self.passed += 1
        bad = (x[:, 0] > EDGE) & (self.passed > self.after)
        if self.way == "weight":
            with torch.no_grad():
                self.scale += torch.where(bad.any(), self.value, 0)
        z, log_det = x * self.scale, 2 * self.scale.abs().log().expand(len(x))
        return WAYS[self.way](self, z, log_det, bad) if self.training else (z, log_det)

    def inverse(self, z, context=None):
        return z / self.scale, -2 * self.scale.abs().log().expand(len(z))


class _MultiplyGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by ``value`` where ``bad``."""

    @staticmethod
    def forward(ctx, x, bad, value):
        ctx.bad, ctx.value = bad, value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(ctx.bad, gradient * ctx.value, gradient), None, None


def output(trap, z, log_det, bad):
    return torch.where(bad[:, None], trap.value, z), log_det


def log_determinant(trap, z, log_det, bad):
    return z, torch.where(bad, trap.value, log_det)


def gradient(trap, z, log_det, bad):
    return _MultiplyGradient.apply(z, bad[:, None], trap.value), log_det


def gradient_of_a_weight(trap, z, log_det, bad):
    scale = _MultiplyGradient.apply(trap.scale, bad.any(), trap.value)
    return z + (scale - scale.detach()), log_det


def weight(trap, z, log_det, bad):
    return z, log_det  # forward has changed the weight


WAYS = {way.__name__: way for way in (output, log_determinant, gradient, gradient_of_a_weight, weight)}


class Spoiled(Moons):
    """Moons with ``value`` at the indices ``spoiled`` of the train split, or at all points beyond ``EDGE``."""

    def __init__(self, *, value: float = math.nan, spoiled: list[int] | None = None, **keys):
        super().__init__(**keys)
        self.value, self.spoiled = value, spoiled

    def _open(self, name):
        split = super()._open(name)
        if name == "train":
            split.data[split.data[:, 0] > EDGE if self.spoiled is None else self.spoiled] = self.value
        return split


def _with_trap(constructor: Callable) -> Callable:
    """Wrap a constructor so that its flow has a ``trap`` among its layers, whose order is ``places``."""

    def build(shape, *, trap, places, **arguments):
        flow = constructor(shape, **arguments)
        layers = {**flow.bijection._modules, "trap": trap(shape=flow.bijection.out_shape)}
        flow.bijection._modules = {name: layers[name] for name in places if name in layers}
        return flow

    signature = inspect.signature(constructor)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("trap", "places")]
    build.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])
    return build


maf, realnvp_vector = _with_trap(flows.maf), _with_trap(flows.realnvp_vector)
