"""A flow: a bijection from data to latent, and the base distribution of the latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from flowtrain.bijections.bijection import (
    Backpropagation,
    Bijection,
    Chain,
    at_least_float32,
    build,
    check_shape,
    is_sequence,
    size,
)
from flowtrain.bijections.columns import FillMissing
from flowtrain.bijections.linear import stacked_weights, stacks
from flowtrain.bijections.noise import AddNoise, with_noise
from flowtrain.bijections.ode import states_only
from flowtrain.bijections.support import support_of
from flowtrain.distributions import Distribution, StandardNormal
from flowtrain.embedding import build_embedding
from flowtrain.flow_distribution import FlowDistribution
from flowtrain.runtime import fusion, global_batch, modes
from flowtrain.runtime.events import as_tensor, batch_shape, check_rows, distinct, map_events, repeat_events

ROWS_AT_ONCE, NUMBERS_AT_ONCE = 1 << 12, 1 << 18  # of x in one pass; see Flow._rows_at_once


class Flow(nn.Module):
    """log p(x) = log p(z) + log|det ∂z/∂x|, z = bijection(x).

    ``forward`` is the log-likelihood of a batch (B, *shape), so that what wraps a module (DDP, compile, hooks) wraps
    that. It does not check values. ``log_prob``, ``bits_per_dim``, ``encode``, ``decode`` and ``sample`` do, for which
    the host waits for the device. They accept tensors, arrays and nested lists of real numbers of any dtype, and
    compute in the precision of the flow's weights. Compiled, ``log_prob``, ``decode`` and ``sample`` are one graph each
    and check shapes alone: a result may not be finite.

    Batches broadcast as in torch.distributions: events (*batch, *shape) and contexts (*batch, *context_shape) give
    results (*batch, …), where either batch may lack dimensions or have some of size 1. Rows of a batch are counted
    from 0 and, of more than one dimension, in the order of memory. Each context is embedded once, for however many
    events.

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
        self._stacks = stacks(self.bijection)

    @property
    def support(self) -> constraints.Constraint:
        """Of the data, as torch.distributions describes one."""
        support = support_of(self.bijection)
        return support.constraint if support else constraints.independent(constraints.real, len(self.shape))

    @property
    def dimensions(self) -> int:
        """D, the number of dimensions of one example."""
        return size(self.shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (B,), in float32 or float64; a lower bound if x is dequantized."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x has events of shape {list(x.shape[1:])}; this flow takes {list(self.shape)}")
        return self.log_prob_given(x, self.embed(context))

    def log_prob_given(self, x: Tensor, features: Tensor | None) -> Tensor:
        """log p(x) of rows x (B, *shape), given what :meth:`embed` returns for their contexts: (B,). As in ``forward``,
        values are not checked."""
        with self._stacked_weights():
            z, log_det = self.bijection(x, features)
        return self.base.log_prob(z, features) + log_det

    def embed(self, context: Tensor | None) -> Tensor | None:
        """What the layers get for the context: the embedding's output, (B, n), or the context itself if there is none.

        >>> from functools import partial
        >>> from flowtrain import flows, nets
        >>> flow = flows.maf((2,), context_shape=(1, 8, 8), embedding=partial(nets.ConvEmbedding, features=4))
        >>> flow.embed(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 4])
        """
        return None if context is None else self._embed(context)

    def _embed(self, context: Tensor) -> Tensor:
        return context if self.embedding is None else self.embedding(context).to(at_least_float32(context.dtype))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats, (*batch), finite; a lower bound if x is dequantized.

        >>> from flowtrain import flows
        >>> flow = flows.maf((3,), hidden=8, context_shape=(2,))
        >>> flow.log_prob(torch.randn(5, 1, 3), torch.randn(4, 2)).shape
        torch.Size([5, 4])
        >>> flow.log_prob(torch.randn(3), torch.randn(2)).shape
        torch.Size([])
        """
        x, features, batch = self._check_events("x", x, self.shape, context, self.hide_missing)
        density = self if self.embedding is None else self.log_prob_given
        most = self._rows_at_once(x)
        found = map_events("x", x, features, "log-likelihood", density, explain=self.explain, most=most)
        return found.reshape(batch)

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """−log p(x)/(D ln 2), (*batch)."""
        return to_bits_per_dim(self.log_prob(x, context), self.dimensions)

    @torch.no_grad()
    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latents of x, (*batch, *out_shape). Integers become the centres of their bins, so that ``decode`` returns
        the same integers."""
        x, features, batch = self._check_events("x", x, self.shape, context, self.hide_missing)
        with global_batch.bin_centres(), states_only(), self._stacked_weights():
            encode, most = lambda *inputs: self.bijection(*inputs)[0], self._rows_at_once(x)
            z = map_events("x", x, features, "latent", encode, explain=self.explain, most=most)
        return z.reshape(*batch, *z.shape[1:])

    @torch.no_grad()
    def decode(self, z: Tensor, context: Tensor | None = None, *, denoise: bool = False) -> Tensor:
        """The data of latents z, (*batch, *shape). With ``denoise`` the noise that
        :class:`flowtrain.bijections.AddNoise` puts on data is taken off them, as in :meth:`sample`; then ``encode``
        does not find z again."""
        z, features, batch = self._check_events("z", z, self.bijection.out_shape, context)
        return self._decode(z, features, denoise).reshape(*batch, *self.shape)

    def _decode(self, z: Tensor, features: Tensor | None, denoise: bool = False) -> Tensor:
        """The data of the rows z, given embedded contexts."""
        invert = self._invert_and_denoise if denoise else lambda *inputs: self.bijection.inverse(*inputs)[0]
        with states_only(), self._stacked_weights():
            most = self._rows_at_once(z)
            return map_events("z", z, features, "inverse", invert, self.hide_missing, most=most)

    def _rows_at_once(self, x: Tensor) -> int | None:
        """How many of many rows x one pass takes: what it computes then fits into a processor's caches. None: all of
        them, as for a gradient, for statistics of the batch, for a GPU and in a compiled program."""
        if torch.is_grad_enabled() or self.training or global_batch.is_numbered():
            return None
        if x.device.type != "cpu" or not modes.values_are_known():
            return None
        return max(1, min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // self.dimensions))

    @property
    def noise(self) -> AddNoise | None:
        """The layer that puts noise on the data, where there is one: the first."""
        first = self.bijection
        while is_sequence(first) and first.layers():
            first = next(iter(first.layers().values()))
        return first if isinstance(first, AddNoise) else None

    def _invert_and_denoise(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The mean of the data, given the noisy sample y of z: y + scale²·∇ log p(y) (Zhai et al. 2024)."""
        noise = self.noise
        if noise is None:
            raise ValueError("denoise: this flow puts no noise on its data; it needs bijections.AddNoise first")
        with with_noise():
            y, _ = self.bijection.inverse(z, context)
            with torch.enable_grad(), modes.using(states_only=False):
                y = y.detach().requires_grad_()
                latent, log_det = self.bijection(y, context)
                (score,) = torch.autograd.grad((self.base.log_prob(latent, context) + log_det).sum(), y)
        return noise.inverse(y.detach() + noise.scale**2 * score)[0]

    @torch.no_grad()
    def latents(
        self,
        shape: int | Sequence[int] = (),
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the base distribution, (*shape, *batch, *out_shape), in float32 or float64, on the flow's device.

        Their noise is drawn on the CPU and does not depend on ``temperature``. So a seed gives the same noise on every
        device and at every temperature. A base distribution that depends on the context needs one, as ``sample`` does.
        """
        features, batch = self._features_of_samples(shape, context)
        z = self._latents(math.prod(batch), temperature, features, generator)
        return z.reshape(*batch, *z.shape[1:])

    @torch.no_grad()
    def sample(
        self,
        shape: int | Sequence[int] = (),
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        denoise: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Examples, (*shape, *batch, *self.shape), for each of the contexts (*batch, *context_shape) as many as
        ``shape`` says. They are drawn and decoded as one batch, without gradients.

        ``temperature`` scales the distance of the latents from their means, which are 0 for standard base distributions
        (Kingma & Dhariwal 2018, section 6); see :meth:`Distribution.sample`. A flow of noisy data, whose first layer is
        :class:`flowtrain.bijections.AddNoise`, takes the noise off its samples by the gradient of its log-density,
        unless ``denoise`` is False.

        Raises:
            ValueError: a context of another shape, which is named beside the flow's; ``denoise`` without noise.

        >>> from flowtrain import flows
        >>> flow = flows.maf((2,), hidden=8, context_shape=(3,))
        >>> flow.sample(5, torch.zeros(3)).shape, flow.sample((5, 4), torch.eye(3)).shape
        (torch.Size([5, 2]), torch.Size([5, 4, 3, 2]))
        """
        features, batch = self._features_of_samples(shape, context)
        z = self._latents(math.prod(batch), temperature, features, generator)
        denoise = self.noise is not None if denoise is None else denoise
        return self._decode(check_rows("z", z, z.dtype), features, denoise).reshape(*batch, *self.shape)

    def rsample_and_log_prob(
        self,
        shape: int | Sequence[int] = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples as :meth:`sample` draws them, (*shape, *batch, *self.shape), and their log-densities,
        (*shape, *batch), in one pass of the inverse, with gradients in weights and contexts.

        It costs what sampling costs: about one pass of ``log_prob`` for couplings, Glow and IAF, as many steps as there
        are dimensions for MAF and autoregressive splines, and a solve for an ODE, whose log-density is estimated unless
        its trace is exact. Values are not checked, so that the host need not wait for the device.

        Raises:
            ValueError: dequantized data, whose samples are rounded; or a base distribution whose samples have no
                gradient, a mixture.

        >>> from flowtrain import flows
        >>> flow = flows.iaf((2,), steps=2, hidden=8)
        >>> x, log_q = flow.rsample_and_log_prob(64)
        >>> (log_q + x.square().sum(1) / 2).mean().backward()  # reverse Kullback-Leibler divergence to a normal
        """
        if not self.bijection.exact:
            raise ValueError("the samples of this flow are rounded: they have neither a gradient nor a density")
        if not self.base.reparameterized:
            raise ValueError(f"samples of a {type(self.base).__name__} base have no gradient; use base=normal")
        features, batch = self._features_of_samples(shape, context, checked=False)
        z = self._latents(math.prod(batch), 1.0, features, generator)
        with self._stacked_weights():
            x, log_det = self.bijection.inverse(z, features)
        log_prob = self.base.log_prob(z, features) - log_det
        return x.reshape(*batch, *self.shape), log_prob.reshape(batch)

    def to_distribution(self, context: Tensor | None = None, validate_args: bool | None = None) -> FlowDistribution:
        """The flow as a ``torch.distributions.Distribution``: its batch is that of ``context``, (*batch,
        *context_shape), its events are the flow's.

        >>> from flowtrain import flows
        >>> flow = flows.maf((3,), hidden=8, context_shape=(2,))
        >>> flow.to_distribution(torch.randn(4, 2)).log_prob(torch.zeros(3)).shape
        torch.Size([4])
        """
        return FlowDistribution(self, context, validate_args)

    @torch.no_grad()
    def base_samples(
        self,
        n: int,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n latents as :meth:`latents` draws them, but one for each row of ``context`` (n, *context_shape)."""
        return self._latents(n, temperature, self.embed(context), generator)

    def _latents(self, n, temperature, features, generator) -> Tensor:
        """n latents, one for each row of the embedded context."""
        z = self.base.sample(n, temperature, features, generator)
        return z.to(self._weight.device, at_least_float32(self._weight.dtype))

    def _features_of_samples(
        self, shape: int | Sequence[int], context: Tensor | None, checked: bool = True
    ) -> tuple[Tensor | None, torch.Size]:
        """The embedded context of each of the samples, as rows, and the samples' batch."""
        context = self.as_context(context)
        leading = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        batch = torch.Size((*leading, *self.context_batch(context)))
        return self._features(context, batch, checked), batch

    def _features(self, context: Tensor | None, batch: torch.Size, checked: bool = True) -> Tensor | None:
        """The embedded context of each row of ``batch``, to which the contexts' own batch broadcasts. Each context is
        checked and embedded once."""
        if context is None:
            return None
        dimensions = len(self.context_batch(context))
        context, dtype = distinct(context, dimensions), at_least_float32(self._weight.dtype)
        own, event = context.shape[:dimensions], context.shape[dimensions:]
        rows = context.reshape(math.prod(own), *event)
        rows = check_rows("context", rows, dtype, self.hide_padding) if checked else rows.to(dtype)
        features = self._embed(rows)
        return repeat_events(features.reshape(*own, *features.shape[1:]), batch, features.shape[1:])

    def as_context(self, context) -> Tensor | None:
        """A context as a tensor, where it is given as an array or nested lists."""
        return None if context is None else as_tensor("context", context, self._weight.device)

    def context_batch(self, context: Tensor | None) -> torch.Size:
        """The batch of a context (*batch, *context_shape). ValueError where it does not fit the flow."""
        if context is None:
            if self.context_shape is None:
                return torch.Size()
            raise ValueError(f"this flow needs a context, of shape {list(self.context_shape)} for each row")
        if self.context_shape is None:
            raise ValueError("this flow takes no context")
        return batch_shape("context", context, self.context_shape)

    def _stacked_weights(self):
        return stacked_weights(self.bijection) if self._stacks else nullcontext()

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
    ) -> tuple[Tensor, Tensor | None, torch.Size]:
        """The rows of x in the flow's precision, their embedded contexts, and their batch. ValueError where they cannot
        be used."""
        x, context = as_tensor(name, x, self._weight.device), self.as_context(context)
        own, given = batch_shape(name, x, shape), self.context_batch(context)
        try:
            batch = own if own == given or not given else torch.broadcast_shapes(own, given)
        except RuntimeError as error:
            raise ValueError(
                f"{name} has a batch of {list(own)} and context one of {list(given)}: they do not broadcast"
            ) from error
        x = check_rows(name, repeat_events(x, batch, shape), at_least_float32(self._weight.dtype), hide)
        return x, self._features(context, batch), batch

    def hide_padding(self, context: Tensor) -> Tensor:
        """The context with 0 in place of what the embedding takes for missing."""
        return getattr(self.embedding, "hide_missing", lambda whole: whole)(context)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start the modules that start from data (each actnorm, also inside networks, and regressions on the context)
        from one batch.

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

    with_context = getattr(kind, "starts_with_context", False)

    def forward(x, *args):
        module.start(x, *(args if with_context else ()))
        return kind.forward(module, x, *args)

    def inverse(z, *args):
        module.start(z, *(args if with_context else ()), inverse=True)
        return kind.inverse(module, z, *args)

    vars(module).update(forward=forward, inverse=inverse)


def to_bits_per_dim(log_prob, dimensions: int):
    """Nats per example to bits per dimension: −log p/(D ln 2)."""
    return -log_prob / (dimensions * math.log(2))
