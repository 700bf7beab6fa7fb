"""The contract that every layer keeps, and the two ways of putting layers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.runtime import fusion


class Bijection(nn.Module):
    """An invertible map of events of ``shape`` to events of ``out_shape``.

    ``forward`` maps data to latent, x ↦ z, and ``inverse`` maps latent to data. Each takes a batch, (B, *shape) or
    (B, *out_shape), and returns the mapped batch and the log-determinant of the map just applied, (B,), in nats, in
    float32 or float64. ``context`` is (B, *context_shape), or None where ``context_shape`` is None.

    A subclass implements ``forward`` and ``inverse`` and sets ``out_shape`` if that differs from ``shape``.

    Two things more may be declared:

    - A bijection that only puts others together sets ``container = True``, and ``inverts_layers = True`` if its
      ``forward`` runs their ``inverse``. The audit, divergence reports, compilation and activation checkpointing then
      look inside it. Its layers are its submodules; where they are not direct ones it overrides :meth:`layers`.
    - ``reversible = True`` lets reversible backpropagation recompute a layer's input from its output, where that is
      cheap and accurate (see :meth:`exact_inputs` and :meth:`recompute`). By default the input is kept, and gradients
      are exact. The promise holds for the class that makes it: a subclass with its own ``forward`` or ``inverse``
      makes it again.

    Args:
        shape: of one event, without the batch.
        context_shape: of the context of one event, or None.

    >>> class Double(Bijection):
    ...     def forward(self, x, context=None):
    ...         return 2 * x, constant_log_det(torch.tensor(2.0).log() * size(self.shape), x)
    ...     def inverse(self, z, context=None):
    ...         return z / 2, constant_log_det(-torch.tensor(2.0).log() * size(self.shape), z)
    >>> z, log_det = Double((3,))(torch.ones(5, 3))
    >>> z.shape, log_det.shape
    (torch.Size([5, 3]), torch.Size([5]))
    """

    exact = True  # False for a surjection, whose log-determinant makes log_prob a lower bound
    traced = False  # True: its log-determinant comes from traces, exact or estimated: see bijections.ode.exact_trace
    reversible = False
    container = False
    inverts_layers = False

    init_arguments: tuple[tuple, dict[str, Any]]  # positional and by name: the audit builds smaller copies
    out_shape: tuple[int, ...]

    def __new__(cls, *args, **kwargs):
        layer = super().__new__(cls)
        vars(layer)["init_arguments"] = args, kwargs
        return layer

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if {"forward", "inverse"} & vars(cls).keys() and "reversible" not in vars(cls):
            cls.reversible = False

    def __init__(self, shape, context_shape=None):
        super().__init__()
        self.shape = check_shape(shape)
        self.out_shape = self.shape
        self.context_shape = None if context_shape is None else tuple(int(n) for n in context_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, *out_shape) and log|det ∂z/∂x| (B,) of x (B, *shape)."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, *shape) and log|det ∂x/∂z| (B,) of z (B, *out_shape)."""
        raise NotImplementedError

    def log_derivatives(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, and log|∂zᵢ/∂xᵢ| of each element, (B, *shape), whose sum is the log-determinant: for a layer each of whose
        zᵢ depends on xᵢ and on elements before it alone. A surjection counts the density of its noise to the element
        that the noise is added to. Raises NotImplementedError for every other layer."""
        raise NotImplementedError

    def layers(self) -> Mapping[str, Bijection]:
        """The bijections directly inside this one, by their names as submodules."""
        return {name: module for name, module in self.named_children() if isinstance(module, Bijection)}

    def exact_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of x that :meth:`recompute` needs to the last bit, since a rounding of them may change the gradient
        by more than a rounding: the input of a rectified network, or of a spline with knots."""
        return ()

    def recompute(
        self, z: Tensor, context: Tensor | None = None, restore: Callable[[Tensor], Tensor] = lambda part: part
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run ``forward`` again for its gradient, given its output: (x, leaf, z, log_det).

        x is recomputed by ``inverse`` without a graph; ``restore`` makes each of its :meth:`exact_inputs`, in order,
        exact. z and log_det depend on ``leaf``, at which the gradient of x arrives; its values do not matter.
        """
        with torch.no_grad():
            x = restore(self.inverse(z, context)[0])
        leaf = x.detach().requires_grad_()
        return x, leaf, *self(leaf, context)

    def fuse(self, following: Bijection):
        """This layer and the ``following`` one as a single, cheaper one, or None."""
        return None

    def extra_repr(self) -> str:
        same = self.shape == self.out_shape
        return f"{list(self.shape)}" if same else f"{list(self.shape)} -> {list(self.out_shape)}"


def walk(bijection: Bijection, inverted: bool = False) -> Iterator[tuple[Bijection, bool]]:
    """``bijection`` and every one inside it, and whether its ``forward`` runs that one's ``inverse``."""
    yield bijection, inverted
    for layer in bijection.layers().values():
        yield from walk(layer, inverted != bijection.inverts_layers)


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant of a map that keeps volume: zeros (B,)."""
    return torch.zeros(x.shape[0], device=x.device, dtype=at_least_float32(x.dtype))


def constant_log_det(value: Tensor, x: Tensor) -> Tensor:
    """One number, the same for every example: (B,)."""
    return value.to(at_least_float32(x.dtype)).expand(x.shape[0])


def sum_event(x: Tensor) -> Tensor:
    """Sum over all axes but the first: (B, …) -> (B,)."""
    return x.sum(tuple(range(1, x.dim())))  # not flattened, which copies where channels lie last


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager:
    """Within it autocast is off: networks may run in lower precision, the flow's own arithmetic does not."""
    device = x.device.type
    # to enter a context that changes nothing costs as much as several small layers
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def build(name: str, factory: Callable[..., Any], **kwargs) -> Any:
    """``factory(**kwargs)``. A ValueError gets ``name`` in front of its message."""
    try:
        return factory(**kwargs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def fuse(layers: Iterable[Bijection]) -> list:
    """The layers, with neighbours fused into one where that costs less."""
    if not fusion.may_fuse():
        return [*layers]
    links: list = []
    for layer in layers:
        both = links[-1].fuse(layer) if links else None
        links[-1 if both else len(links) :] = [both or layer]
    return links


def apply_in_turn(
    links: Iterable[Callable], x: Tensor, context: Tensor | None, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x through ``links``, one after the other, and the sum of their log-determinants, in order, added to ``total``."""
    for link in links:
        x, log_det = link(x, context)
        total = log_det if total is None else total + log_det
    return x, zero_log_det(x) if total is None else total


class Backpropagation:
    """How chains find their layers' gradients: here by keeping all activations. Others are in backpropagation.py."""

    def chains(self, bijection: Bijection) -> list[Chain]:
        """The chains in ``bijection`` that this changes. ValueError if the bijection cannot be trained so."""
        return [layer for layer, _ in walk(bijection) if isinstance(layer, Chain)]

    def run(self, chain: Chain, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``chain.forward``."""
        return apply_in_turn(fuse(chain), x, context)

    def statistics(self) -> dict[str, float]:
        """What a trainer may log."""
        return {}


class Chain(Bijection):
    """Named layers one after the other, each built for the shape that the previous one returns.

    Args:
        shape: of one event.
        layers: name -> factory, called as ``factory(shape=…, context_shape=…)``; a None is left out.
        order: the names in the order of ``forward``; by default that of ``layers``.
        repeat: so many copies of the layers, each with parameters of its own, named 0, 1, ….
        context_shape: of the context, which every layer gets; or None.

    Raises:
        ValueError: an ``order`` that does not name each layer once, ``repeat`` below 1, a name that a module's
            attribute has, or what a layer refuses, with the layer's name.

    >>> from flowtrain import bijections as b
    >>> Chain((4,), {"norm": b.ActNorm, "mixing": b.LULinear}, repeat=2)(torch.randn(8, 4))[0].shape
    torch.Size([8, 4])
    """

    container = True
    reversible = True  # if all of its layers are
    backpropagation: Backpropagation = Backpropagation()  # Flow.set_backpropagation sets another

    def __init__(
        self,
        shape,
        layers: Mapping[str, Callable[..., Bijection] | None],
        order: list[str] | None = None,
        repeat: int = 1,
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        if repeat < 1:
            raise ValueError(f"repeat={repeat} must be at least 1")
        names = list(layers) if order is None else list(order)
        if sorted(names) != sorted(layers):
            raise ValueError(f"order must name each layer once: {sorted(layers)}")
        factories = {name: factory for name in names if (factory := layers[name]) is not None}
        if repeat > 1:
            factories_of_one = factories
            factories = {str(i): lambda **kwargs: Chain(layers=factories_of_one, **kwargs) for i in range(repeat)}
        for name, factory in factories.items():
            if hasattr(self, name):
                raise ValueError(f"a layer cannot be named '{name}'")
            layer = build(name, factory, shape=self.out_shape, context_shape=context_shape)
            self.add_module(name, layer)
            self.out_shape = layer.out_shape
        self.exact = all(layer.exact for layer in self)
        self.reversible = type(self).reversible and all(layer.reversible for layer in self)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.layers().values())

    def layers(self):
        return self._modules

    def forward(self, x, context=None):
        return self.backpropagation.run(self, x, context)  # unless one is set that saves memory: apply_in_turn

    def inverse(self, z, context=None):
        return apply_in_turn([link.inverse for link in reversed(fuse(self))], z, context)


def is_sequence(layer: Bijection) -> bool:
    """Whether ``layer`` is nothing but its layers in turn: a chain, and no subclass with its own ``forward``."""
    return isinstance(layer, Chain) and type(layer).forward is Chain.forward


class Inverse(Bijection):
    """A bijection run backwards: its ``forward`` is the other's ``inverse``. IAF is ``Inverse`` of MAF.

    Args:
        shape: of one event, which the bijection keeps.
        bijection: factory, called as ``bijection(shape=…, context_shape=…)``.
        context_shape: of the context, or None.

    Raises:
        ValueError: the bijection changes the shape, or is a surjection.

    >>> from flowtrain import bijections as b
    >>> Inverse((3,), b.LULinear)(torch.randn(8, 3))[0].shape
    torch.Size([8, 3])
    """

    container = True
    inverts_layers = True

    def __init__(self, shape, bijection: Callable[..., Bijection], context_shape=None):
        super().__init__(shape, context_shape)
        self.bijection = bijection(shape=shape, context_shape=context_shape)
        if self.bijection.out_shape != self.shape:
            raise ValueError(f"Inverse takes a layer that keeps its shape, not {self.bijection.extra_repr()}")
        if not self.bijection.exact:
            raise ValueError("Inverse takes a bijection, not a surjection")

    def forward(self, x, context=None):
        return self.bijection.inverse(x, context)

    def log_derivatives(self, x, context=None):
        z, _ = self.bijection.inverse(x, context)
        return z, -self.bijection.log_derivatives(z, context)[1]

    def inverse(self, z, context=None):
        return self.bijection(z, context)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple of integers. ValueError if it is not a sequence of positive integers."""
    try:
        sizes = tuple(index(n) for n in shape)
    except TypeError:
        sizes = (0,)
    if min(sizes, default=0) < 1:
        raise ValueError(f"shape must be a sequence of positive integers, such as (3,), not {shape!r}")
    return sizes


def size(shape) -> int:
    """The number of dimensions D of an event of ``shape``."""
    return prod(shape)
