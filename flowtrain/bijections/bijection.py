"""The contract that every layer keeps, and the two ways of putting layers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
from torch import Tensor, nn

from flowtrain.runtime import fusion


class Bijection(nn.Module):
    """An invertible map of events of ``shape`` to events of ``out_shape``.

    ``forward`` runs from data to latent, ``inverse`` from latent to data. Both take ``(B, *shape)`` and return the
    mapped batch with the log-determinant of the map just applied, ``(B,)``, in float32 at least. ``context`` is
    ``(B, *context_shape)`` or None.
    """

    exact = True  # False for a surjection, whose log-determinant makes log_prob a lower bound
    reversible = True  # False where ``inverse`` is dear or coarse: then memory=reversible keeps the layer's input

    def __new__(cls, *args, **kwargs):
        layer = super().__new__(cls)
        vars(layer)["made"] = args, kwargs  # how: an audit makes it again for smaller events
        return layer

    def __init__(self, shape, context_shape=None):
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        self.out_shape = self.shape
        self.context_shape = None if context_shape is None else tuple(int(n) for n in context_shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def clues(self, x: Tensor) -> tuple[Tensor, ...]:
        """What of x has to be exact when ``forward`` is run once more for its gradient, since a rounding of it may turn
        that into another: what goes through a rectifier, or meets a spline's knots."""
        return ()

    def retrace(
        self, z: Tensor, context: Tensor | None = None, mend: Callable[[Tensor], Tensor] = lambda clue: clue
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``forward`` once more, for its gradient, from what it returned: (x, leaf, z, log_det).

        x is recomputed by ``inverse``, without a graph; ``mend`` makes each of its :meth:`clues`, in order, exact. The
        gradient of x arrives at ``leaf``, whatever its values.
        """
        with torch.no_grad():
            x = mend(self.inverse(z, context)[0])
        leaf = x.detach().requires_grad_()
        return x, leaf, *self(leaf, context)

    def join(self, following: Bijection):
        """This layer and the ``following`` one as a single one that costs less (in both directions), or None."""
        return None

    def extra_repr(self) -> str:
        same = self.shape == self.out_shape
        return f"{list(self.shape)}" if same else f"{list(self.shape)} -> {list(self.out_shape)}"


def zero_log_det(x: Tensor) -> Tensor:
    """The log-determinant of a map that keeps volume: zeros (B,)."""
    return torch.zeros(len(x), device=x.device, dtype=at_least_float32(x.dtype))


def constant_log_det(value: Tensor, x: Tensor) -> Tensor:
    """One number, the same for every example: (B,)."""
    return value.to(at_least_float32(x.dtype)).expand(len(x))


def sum_event(x: Tensor) -> Tensor:
    """(B, …) -> (B,)."""
    return x.sum(tuple(range(1, x.dim())))  # not flattened, which copies where channels lie last


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager:
    """A flow's own arithmetic stays out of autocast: only networks run in lower precision."""
    device = x.device.type
    # to enter a context that changes nothing costs as much as several small layers
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def built(name: str, factory: Callable, **kwargs) -> nn.Module:
    """``factory(**kwargs)``, with the layer's name in front of what it refuses."""
    try:
        return factory(**kwargs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def joined(layers: Iterable[Bijection]) -> list:
    """The layers, with neighbours in one where that costs less."""
    links = []
    for layer in layers:
        both = links[-1].join(layer) if links and not fusion.separate() else None
        links[-1 if both else len(links) :] = [both or layer]
    return links


def through(links: Iterable, x: Tensor, context: Tensor | None, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x through ``links``, one after the other, and the sum of their log-determinants, in order, added to ``total``."""
    total = zero_log_det(x) if total is None else total
    for link in links:
        x, log_det = link(x, context)
        total = total + log_det
    return x, total


class Memory:
    """What chains keep of their layers' work for the gradient: everything. Others are in memory.py."""

    def chains(self, flow: nn.Module) -> list[Chain]:
        """Those of ``flow`` that this is for. ValueError where the flow cannot be trained so."""
        return [module for module in flow.modules() if isinstance(module, Chain)]

    def run(self, chain: Chain, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return through(joined(chain), x, context)

    def statistics(self) -> dict[str, float]:
        """What a trainer may log."""
        return {}


class Chain(Bijection):
    """Named layers one after the other, each built for the shape that the previous one leaves.

    ``layers`` maps names to factories called as ``factory(shape=…, context_shape=…)``; a None is left out.
    ``order`` lists the names in the order of ``forward`` where the mapping's own will not do, and ``repeat`` stacks
    that many copies, each with parameters of its own, named 0, 1, ….
    """

    memory = Memory()  # Flow.keep gives another

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
        factories = {name: layers[name] for name in names if layers[name] is not None}
        if repeat > 1:
            factories = {str(i): lambda **kwargs: Chain(layers=factories_of_one, **kwargs) for i in range(repeat)}
            factories_of_one = {name: layers[name] for name in names}
        for name, factory in factories.items():
            if hasattr(self, name):
                raise ValueError(f"a layer cannot be named '{name}'")
            layer = built(name, factory, shape=self.out_shape, context_shape=context_shape)
            self.add_module(name, layer)
            self.out_shape = layer.out_shape
        self.exact = all(layer.exact for layer in self)
        self.reversible = all(layer.reversible for layer in self)

    def __iter__(self):
        return iter(self._modules.values())

    def forward(self, x, context=None):
        return self.memory.run(self, x, context)

    def inverse(self, z, context=None):
        return through([link.inverse for link in reversed(joined(self))], z, context)


class Inverse(Bijection):
    """A bijection run backwards: its ``forward`` is the other's ``inverse``. IAF is ``Inverse`` of MAF."""

    reversible = False

    def __init__(self, shape, bijection: Callable[..., Bijection], context_shape=None):
        super().__init__(shape, context_shape)
        self.bijection = bijection(shape=shape, context_shape=context_shape)
        if self.bijection.out_shape != self.shape:
            raise ValueError(f"Inverse takes a layer that keeps its shape, not {self.bijection.extra_repr()}")
        if not self.bijection.exact:
            raise ValueError("Inverse takes a bijection, not a surjection")

    def forward(self, x, context=None):
        return self.bijection.inverse(x, context)

    def inverse(self, z, context=None):
        return self.bijection(z, context)


def size(shape) -> int:
    """The number of dimensions D of an event of ``shape``."""
    return prod(shape)
