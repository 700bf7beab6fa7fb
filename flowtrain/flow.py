"""A flow: a bijection from data to latent, and the base distribution of the latent."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Backpropagation, Bijection, Chain, at_least_float32, build, check_shape, size
from flowtrain.bijections.columns import FillMissing
from flowtrain.bijections.linear import dense_layers, stacked_log_dets
from flowtrain.bijections.ode import states_only
from flowtrain.bijections.support import support_of
from flowtrain.distributions import Distribution, StandardNormal
from flowtrain.embedding import build_embedding
from flowtrain.runtime import fusion, global_batch, modes


class Flow(nn.Module):
    """log p(x) = log p(z) + log|det ∂z/∂x|, z = bijection(x).

    ``forward`` is the log-likelihood, so that what wraps a module (DDP, compile, hooks) wraps that. It does not check
    values. ``log_prob``, ``bits_per_dim``, ``encode``, ``decode`` and ``sample`` do, for which the host waits for the
    device. They accept real numbers of any dtype and compute in the precision of the flow's weights. Compiled,
    ``log_prob``, ``decode`` and ``sample`` are one graph each and check shapes alone: a result may not be finite.

    Args:
        shape: of one example, as the data hold it (raw integers for images).
        bijection: factory called with ``shape`` and ``context_shape``.
        base: factory called with the bijection's ``out_shape`` as ``shape`` and with ``context_shape``.
        context_shape: of the context of each example, or None.
        embedding: a network that the flow trains with its layers, a module or a factory called with ``context_shape``:
            the layers and the base get ``embedding(context)`` for the context. :mod:`flowtrain.nets` has some.

    Raises:
        ValueError: ``shape`` is not a sequence of positive integers, or ``embedding`` does not take the contexts. In
            the methods that check values: a wrong shape, a context that is missing or that the flow does not take, or
            an input or result that is not finite. The message names the shape or the first row (from 0) at fault. NaN
            is a missing value where the flow has a :class:`flowtrain.bijections.FillMissing` and the row's indicator
            says so.

    >>> from functools import partial
    >>> from flowtrain import Flow, bijections as b, nets
    >>> flow = Flow((2,), partial(b.Autoregressive, univariate=b.ExpAffine, net=nets.MADE))
    >>> flow.log_prob(torch.randn(5, 2)).shape, flow.sample(3).shape
    (torch.Size([5]), torch.Size([3, 2]))

    A density given a set of up to 20 points of the plane:

    >>> flow = Flow((2,), partial(b.Coupling, univariate=b.ExpAffine, net=nets.MLP), context_shape=(20, 2),
    ...             embedding=partial(nets.DeepSet, features=8))
    >>> flow.log_prob(torch.randn(5, 2), torch.randn(5, 20, 2)).shape
    torch.Size([5])
    """

    backpropagation = Backpropagation()

    def __init__(
        self,
        shape,
        bijection: Callable[..., Bijection],
        base: Callable[..., Distribution] = StandardNormal,
        context_shape=None,
        embedding: Callable[..., nn.Module] | nn.Module | None = None,
    ):
        super().__init__()
        self.shape = check_shape(shape)
        self.context_shape = None if context_shape is None else check_shape(context_shape)
        self.embedding, embedded = build_embedding(embedding, self.context_shape)
        self.bijection: Bijection = build("bijection", bijection, shape=self.shape, context_shape=embedded)
        self.base: Distribution = build("base", base, shape=self.bijection.out_shape, context_shape=embedded)
        self._stacks = any(True for _ in dense_layers(self.bijection))

    @property
    def dimensions(self) -> int:
        """D, the number of dimensions of one example."""
        return size(self.shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (B,), in float32 or float64; a lower bound if x is dequantized."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x has events of shape {list(x.shape[1:])}; this flow takes {list(self.shape)}")
        context = self.embed(context)
        with self._stacked_log_dets():
            z, log_det = self.bijection(x, context)
        return self.base.log_prob(z, context) + log_det

    def embed(self, context: Tensor | None) -> Tensor | None:
        """What the layers get for the context: the embedding's output, (B, n), or the context itself if there is none.

        >>> from functools import partial
        >>> from flowtrain import flows, nets
        >>> flow = flows.maf((2,), context_shape=(1, 8, 8), embedding=partial(nets.ConvEmbedding, features=4))
        >>> flow.embed(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 4])
        """
        if self.embedding is None or context is None:
            return context
        return self.embedding(context).to(at_least_float32(context.dtype))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (B,), finite; a lower bound if x is dequantized."""
        x, context = self._check_events("x", x, self.shape, context, self.hide_missing)
        return map_events("x", x, context, "log-likelihood", self, explain=self.explain)

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """−log p(x)/(D ln 2), (B,)."""
        return to_bits_per_dim(self.log_prob(x, context), self.dimensions)

    @torch.no_grad()
    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latents of x. Integers become the centres of their bins, so that ``decode`` returns the same integers."""
        x, context = self._check_events("x", x, self.shape, context, self.hide_missing)
        context = self.embed(context)
        with global_batch.bin_centres(), states_only(), self._stacked_log_dets():
            return map_events(
                "x", x, context, "latent", lambda *inputs: self.bijection(*inputs)[0], explain=self.explain
            )

    @torch.no_grad()
    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data of latents z."""
        z, context = self._check_events("z", z, self.bijection.out_shape, context)
        return self._decode(z, self.embed(context))

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        """The data of latents z, given the embedded context."""
        with states_only(), self._stacked_log_dets():
            return map_events(
                "z", z, context, "inverse", lambda *inputs: self.bijection.inverse(*inputs)[0], self.hide_missing
            )

    @torch.no_grad()
    def latents(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n samples of the base distribution, (n, *out_shape), in float32 or float64, on the flow's device.

        Their noise is drawn on the CPU and does not depend on ``temperature``. So a seed gives the same noise on every
        device and at every temperature. A base distribution that depends on the context needs one, as ``sample`` does.
        """
        context, leading = self._repeat_context(n, context)
        z = self._base_samples(math.prod(leading), temperature, context, generator)
        return z.reshape(*leading, *z.shape[1:])

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n examples, (n, *shape), all with the one ``context``, (*context_shape) or (1, *context_shape); or n for each
        of m contexts (m, *context_shape): (n, m, *shape). They are drawn and decoded as one batch.

        ``temperature`` scales the distance of the latents from their means, which are 0 for standard base distributions
        (Kingma & Dhariwal 2018, section 6); see :meth:`Distribution.sample`.

        Raises:
            ValueError: a context of another shape, which is named beside the flow's.

        >>> from functools import partial
        >>> from flowtrain import bijections as b, nets
        >>> maf = partial(b.Autoregressive, univariate=b.ExpAffine, net=nets.MADE)
        >>> flow = Flow((2,), maf, context_shape=(3,))
        >>> flow.sample(5, context=torch.zeros(3)).shape, flow.sample(5, context=torch.eye(3)).shape
        (torch.Size([5, 2]), torch.Size([5, 3, 2]))
        """
        if context is None and self.context_shape is not None:
            raise ValueError(f"samples of this flow need a context, {list(self.context_shape)}")
        context, leading = self._repeat_context(n, context)
        z = self._base_samples(math.prod(leading), temperature, context, generator)
        x = self._decode(check_events("z", z, self.bijection.out_shape, z.dtype), context)
        return x.reshape(*leading, *x.shape[1:])

    @torch.no_grad()
    def base_samples(
        self,
        n: int,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n latents as :meth:`latents` draws them, but one for each row of ``context`` (n, *context_shape)."""
        return self._base_samples(n, temperature, self.embed(context), generator)

    def _base_samples(self, n, temperature, context, generator) -> Tensor:
        """n latents, one for each row of the embedded context."""
        z = self.base.sample(n, temperature, context, generator)
        return z.to(self._weight.device, at_least_float32(self._weight.dtype))

    def _repeat_context(self, n: int, context: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
        """The context of each of n samples, or of n·m samples of m contexts, embedded; the samples' leading shape."""
        shape = self.context_shape
        if context is None:
            return None, (n,)
        if shape is None:
            raise ValueError("this flow takes no context")
        if context.shape != shape and context.shape[1:] != shape:
            many = ", ".join(map(str, ("m", *shape)))
            raise ValueError(f"context has shape {list(context.shape)}; this flow takes {list(shape)} or [{many}]")
        context = context if context.dim() > len(shape) else context[None]
        m = len(context)
        embedded = self.embed(self._check_context(context))
        assert embedded is not None
        return embedded.expand(n, *embedded.shape).flatten(0, 1), (n,) if m == 1 else (n, m)

    def _stacked_log_dets(self):
        stacks = self._stacks and self.backpropagation.together
        return stacked_log_dets(self.bijection) if stacks else nullcontext()

    @property
    def _weight(self) -> Tensor:
        """Any weight of the flow: its device and precision are the flow's."""
        return next(self.parameters(), torch.empty(0))

    def hide_missing(self, x: Tensor) -> Tensor:
        """x with 0 in place of the values that this flow takes for missing."""
        for layer in self.modules():
            if isinstance(layer, FillMissing):
                return layer.hide(x)
        return x

    def explain(self, x: Tensor) -> str:
        """Why there is no density at the event x: it is outside the support. Empty for one inside."""
        support = support_of(self.bijection)
        reason = support.explain(x) if support else None
        return f": it is outside the support, for {reason}" if reason else ""

    def _check_events(
        self, name: str, x: Tensor, shape: tuple, context: Tensor | None, hide: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x and its context in the flow's precision. ValueError where they cannot be used."""
        x = check_events(name, x, shape, at_least_float32(self._weight.dtype), hide)
        if self.context_shape is None:
            if context is not None:
                raise ValueError("this flow takes no context")
            return x, None
        if context is None or len(context) != len(x):
            raise ValueError(f"{len(x)} rows need a context of {len(x)} rows, {list(self.context_shape)} each")
        return x, self._check_context(context)

    def _check_context(self, context: Tensor) -> Tensor:
        """The context, before it is embedded, in the flow's precision. ValueError where it cannot be used."""
        dtype, shape = at_least_float32(self._weight.dtype), self.context_shape or ()
        return check_events("context", context, shape, dtype, self.hide_padding)

    def hide_padding(self, context: Tensor) -> Tensor:
        """The context with 0 in place of what the embedding takes for missing."""
        return getattr(self.embedding, "hide_missing", lambda whole: whole)(context)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start the modules that start from data (each actnorm, also inside networks) from one batch.

        Call it once, before the flow is wrapped, averaged or compiled. Modules that have started stay as they are.
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

    def set_backpropagation(self, backpropagation: Backpropagation) -> None:
        """Set how chains of layers find their gradients: see :mod:`flowtrain.bijections.backpropagation`.

        Raises:
            ValueError: this flow cannot be trained so.
        """
        modules: list[Flow | Chain] = [self, *backpropagation.chains(self.bijection)]
        for module in modules:
            if (
                type(backpropagation) is Backpropagation
            ):  # the class has it: a new attribute would make torch compile again
                vars(module).pop("backpropagation", None)
            else:
                module.backpropagation = backpropagation

    def statistics(self) -> dict[str, float]:
        """What a trainer may log. Every process calls this at the same step."""
        return self.backpropagation.statistics()


def _start_on_first_use(module: nn.Module) -> None:
    """Replace the module's ``forward`` and ``inverse`` by ones that first start it from their input."""
    kind = type(module)

    def forward(x, *args):
        module.start(x)
        return kind.forward(module, x, *args)

    def inverse(z, *args):
        module.start(z, inverse=True)
        return kind.inverse(module, z, *args)

    vars(module).update(forward=forward, inverse=inverse)


def to_bits_per_dim(log_prob, dimensions: int):
    """Nats per example to bits per dimension: −log p/(D ln 2)."""
    return -log_prob / (dimensions * math.log(2))


def check_events(
    name: str, x: Tensor, shape: tuple, dtype: torch.dtype, hide: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``x`` (B, *shape) in ``dtype``. ``hide`` replaces the numbers of x that need not be finite.

    Raises:
        ValueError: it has another shape, is complex, or has a row that is not finite.
    """
    if x.shape[1:] != shape:
        raise ValueError(f"{name} has events of shape {list(x.shape[1:])}; this flow takes {list(shape)}")
    if x.is_complex():
        raise ValueError(f"{name} holds complex numbers")
    x = x.to(dtype)
    if (row := _first_not_finite(x if hide is None else hide(x))) is not None:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"row {row} of {name} holds a number that is not finite in {kind}")
    return x


def map_events(
    name: str,
    x: Tensor,
    context: Tensor | None,
    what: str,
    function: Callable[..., Tensor],
    hide: Callable[[Tensor], Tensor] | None = None,
    explain: Callable[[Tensor], str] = lambda row: "",
) -> Tensor:
    """``function(x, context)``, each row of which is the ``what`` of a row of x. ``hide`` replaces the numbers of it
    that need not be finite; ``explain`` says more of a row without a finite one.

    Raises:
        ValueError: a row of it is not finite, or ``function`` raised FloatingPointError.
    """
    try:
        result = function(x, context)
    except FloatingPointError as error:
        first = _first_failure(function, x, context)
        raise ValueError(f"{_row(name, x, first)} {what}: {error}") from error
    if (row := _first_not_finite(result if hide is None else hide(result))) is not None:
        raise ValueError(f"{_row(name, x, row)} {what} that is finite{explain(x[row])}")
    return result


def _row(name: str, x: Tensor, row: int) -> str:
    low, high = x[row][~x[row].isnan()].aminmax()
    return f"row {row} of {name}, of numbers from {low:g} to {high:g}, has no"


def _first_not_finite(x: Tensor) -> int | None:
    if not modes.values_are_known():
        return None
    finite = x.isfinite()
    if finite.all():
        return None
    return int((~finite).reshape(len(x), -1).any(1).nonzero()[0])


def _first_failure(function: Callable, x: Tensor, context: Tensor | None) -> int:
    """The first row for which ``function`` raises FloatingPointError, by bisection; there is one."""
    first, end = 0, len(x)
    while end - first > 1:
        middle = (first + end) // 2
        try:
            function(x[first:middle], None if context is None else context[first:middle])
            first = middle
        except FloatingPointError:
            end = middle
    return first
