"""A flow: a bijection from data to latent and the distribution of the latent."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Bijection, Memory, at_least_float32, built, size
from flowtrain.bijections.ode import states_only
from flowtrain.distributions import Distribution, StandardNormal
from flowtrain.runtime import fusion, globalbatch


class Flow(nn.Module):
    """log p(x) = log p(z) + log|det ∂z/∂x|, z = bijection(x).

    Args:
        shape: of one example, as the data hold it (raw integers for images).
        bijection: factory called with ``shape`` and ``context_shape``.
        base: factory called with the bijection's ``out_shape`` as ``shape`` and with ``context_shape``.
        context_shape: of the context that comes with each example, or None.

    ``forward`` is the likelihood, so that whatever wraps a module (DDP, compile, hooks) wraps that; it computes, and
    looks at no number. ``log_prob``, ``bits_per_dim``, ``encode``, ``decode`` and ``sample`` look, for which the host
    waits for the device: they take real numbers of any kind, compute in the precision of the flow's weights, and return
    what is finite or raise a ValueError that names the shape or the first row (from 0) at fault.
    """

    memory = Memory()

    def __init__(
        self,
        shape,
        bijection: Callable[..., Bijection],
        base: Callable[..., Distribution] = StandardNormal,
        context_shape=None,
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.bijection = built("bijection", bijection, shape=self.shape, context_shape=context_shape)
        self.base = built("base", base, shape=self.bijection.out_shape, context_shape=context_shape)

    @property
    def dimensions(self) -> int:
        """D, the number of dimensions of one example."""
        return size(self.shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (B,), float32 at least; of raw integers, a bound where they are dequantized."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x has events of shape {list(x.shape[1:])}; this flow takes {list(self.shape)}")
        z, log_det = self.bijection(x, context)
        return self.base.log_prob(z, context) + log_det

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``forward``'s log p(x) in nats, (B,), looked at: finite or a ValueError."""
        return mapped("x", *self._taken("x", x, self.shape, context), "log-likelihood", self)

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """−log p(x)/(D ln 2), (B,)."""
        return to_bits_per_dim(self.log_prob(x, context), self.dimensions)

    @torch.no_grad()
    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latent of x; integers go in at the centre of their bins, so that ``decode`` returns the very same."""
        x, context = self._taken("x", x, self.shape, context)
        with globalbatch.centred(), states_only():
            return mapped("x", x, context, "latent", lambda *given: self.bijection(*given)[0])

    @torch.no_grad()
    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data of a latent."""
        z, context = self._taken("z", z, self.bijection.out_shape, context)
        with states_only():
            return mapped("z", z, context, "inverse", lambda *given: self.bijection.inverse(*given)[0])

    @torch.no_grad()
    def latents(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """n draws from the base as it is now, float32 at least, on the flow's device.

        Their noise is made on the CPU and does not depend on ``temperature``: a seed gives the same on every device,
        and draws at several temperatures that differ in nothing else. A base that depends on the context needs one,
        (n, *context_shape).
        """
        z = self.base.sample(n, temperature, context, generator)
        return z.to(self._like.device, at_least_float32(self._like.dtype))

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n examples, (n, *shape). ``temperature`` scales how far the latents lie from their means, which are 0 for the
        standard bases (Kingma & Dhariwal 2018, section 6); see ``Distribution.sample``."""
        return self.decode(self.latents(n, temperature, generator, context), context)

    @property
    def _like(self) -> Tensor:
        """Some number of the flow's: where and in which precision it computes."""
        return next(self.parameters(), torch.empty(0))

    def _taken(self, name: str, x: Tensor, shape: tuple, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x and its context as the flow takes them. ValueError where it cannot."""
        dtype, wanted = at_least_float32(self._like.dtype), self.bijection.context_shape
        x = taken(name, x, shape, dtype)
        if wanted is None:
            return x, None
        if context is None or len(context) != len(x):
            raise ValueError(f"{len(x)} rows need a context of {len(x)} rows, {list(wanted)} each")
        return x, taken("context", context, wanted, dtype)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start what starts from data (each actnorm, also inside networks) from one batch, data to latent.

        To be called once, before the flow is wrapped, averaged or compiled. What has started already is left alone.
        """
        waiting = [module for module in self.modules() if hasattr(module, "start") and not module.started]
        for module in waiting:
            _start_on_first_use(module)
        was_training = self.training
        self.eval()
        try:
            with fusion.layer_by_layer():
                self(x, context)
        finally:
            self.train(was_training)
            for module in waiting:
                vars(module).pop("forward", None)
                vars(module).pop("inverse", None)

    def keep(self, memory: Memory) -> None:
        """Keep of the layers' work in training what ``memory`` does: see :mod:`flowtrain.bijections.memory`.

        Raises:
            ValueError: this flow cannot be trained so.
        """
        for part in (self, *memory.chains(self)):
            part.memory = memory

    def statistics(self) -> dict[str, float]:
        """What a trainer may log, on every process at the same step."""
        return self.memory.statistics()


def _start_on_first_use(module: nn.Module) -> None:
    """Shadow the module's two directions by ones that first start it from what they are given."""
    kind = type(module)

    def forward(x, *args):
        module.start(x)
        return kind.forward(module, x, *args)

    def inverse(z, *args):
        module.start(z, inverse=True)
        return kind.inverse(module, z, *args)

    vars(module).update(forward=forward, inverse=inverse)


def to_bits_per_dim(log_prob, dimensions: int):
    """Nats per example to bits per dimension: the one place where this is said."""
    return -log_prob / (dimensions * math.log(2))


def taken(name: str, x: Tensor, shape: tuple, dtype: torch.dtype) -> Tensor:
    """``x`` (B, *shape) in ``dtype``.

    Raises:
        ValueError: its shape is another, it is complex, or a row of it is not finite.
    """
    if x.shape[1:] != shape:
        raise ValueError(f"{name} has events of shape {list(x.shape[1:])}; this flow takes {list(shape)}")
    if x.is_complex():
        raise ValueError(f"{name} holds complex numbers")
    x = x.to(dtype)
    if (row := _first_not_finite(x)) is not None:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"row {row} of {name} holds a number that is not finite in {kind}")
    return x


def mapped(name: str, x: Tensor, context: Tensor | None, what: str, function: Callable[..., Tensor]) -> Tensor:
    """``function(x, context)``, row by row ``what`` of x.

    Raises:
        ValueError: a row of it is not finite, or ``function`` raised FloatingPointError.
    """
    try:
        made = function(x, context)
    except FloatingPointError as error:
        row = _first_refused(function, x, context)
        raise ValueError(f"{_row(name, x, row)} {what}: {error}") from error
    if (row := _first_not_finite(made)) is not None:
        raise ValueError(f"{_row(name, x, row)} {what} that is finite")
    return made


def _row(name: str, x: Tensor, row: int) -> str:
    low, high = x[row].aminmax()
    return f"row {row} of {name}, of numbers from {low:g} to {high:g}, has no"


def _first_not_finite(x: Tensor) -> int | None:
    finite = x.isfinite()
    if finite.all():
        return None
    return int((~finite).reshape(len(x), -1).any(1).nonzero()[0])


def _first_refused(function: Callable, x: Tensor, context: Tensor | None) -> int:
    """The first row that ``function`` raises FloatingPointError for, given rows among which there is one."""
    first, end = 0, len(x)
    while end - first > 1:
        middle = (first + end) // 2
        try:
            function(x[first:middle], None if context is None else context[first:middle])
            first = middle
        except FloatingPointError:
            end = middle
    return first
