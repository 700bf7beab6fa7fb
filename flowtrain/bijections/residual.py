"""Residual flows: z = x + g(x) with a network g that contracts (Behrmann et al. 2019; Chen et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowtrain.bijections.bijection import Bijection, at_least_float32, full_precision, size, sum_event, zero_log_det
from flowtrain.bijections.ode import EXACT_LIMIT, NOISE, rows_of_trace
from flowtrain.runtime import kept, modes

TRUNCATION = 1e-4  # nats: the most that an evaluation may leave out of a layer's power series
EXACT_IN_TRAINING = 8  # dimensions
LONGEST = 10_000  # terms of such a series
MOST_TERMS = 100  # the mean of their random number: far above what training needs


class Residual(Bijection):
    """z = x + g(x), log-determinant log det(I + J) with J = ∂g/∂x, where g has a Lipschitz constant below 1 in x.

    In training the log-determinant of events of many dimensions is the power series Σ (−1)^(k+1)/k tr Jᵏ (Chen et al.
    2019, eq. 6): the first ``exact_terms`` of it, then a random number of terms, each divided by the probability cₖ⁻¹
    that it is computed, with traces estimated as vᵀJᵏv. Its value is unbiased. So is its gradient, which is that of a
    single product wᵀJv, with wᵀ = Σ (−1)^(k+1) cₖ vᵀJ^(k−1) a constant (eq. 8). The forward pass computes w and keeps
    nothing but x, v and w, of the size of x; the backward pass runs g once more. So memory grows neither with the
    number of terms nor with the network. (The paper finds the gradient itself in its forward pass, which is right only
    where all examples have the same weight in the loss.)

    In evaluation the log-determinant is exact for events of up to 64 dimensions, by their Jacobians. For larger ones it
    is the series with Hutchinson's noise, continued for each row until what is left cannot exceed 10⁻⁴ nats.

    The inverse is the limit of x ← z − g(x). Each row stops for itself, where it no longer moves but by roundings.
    Gradients of the inverse are those of its limit, by the implicit function theorem.

    The network computes in float32 or float64, under autocast too.

    Args:
        shape: of one event.
        net: factory ``net(shape=…, context_shape=…)`` of g, called as ``g(x, context)``, with an attribute
            ``lipschitz``, a bound below 1 of its Lipschitz constant: :class:`flowtrain.nets.LipschitzMLP`,
            :class:`flowtrain.nets.LipschitzConvNet`.
        trace: in training: "exact", a gradient for each dimension; "hutchinson", the random series; or "auto": exact
            for events of up to 8 dimensions, where it costs about as much and has no variance.
        noise: distribution of v: "rademacher" or "gaussian".
        exact_terms: of the series, that are always computed.
        terms: distribution of the number of the others: "geometric" or "poisson".
        mean_terms: its mean. It is the same for all examples of a step.
        max_steps: of the inverse.
        context_shape: of a context that the network reads too, or None.

    Raises:
        ValueError: an argument outside its range, or a network whose Lipschitz constant is not below 1.
        FloatingPointError: where a row has no fixed point after ``max_steps``, or a series does not converge: the
            network does not contract.

    >>> from flowtrain import nets
    >>> layer = Residual((2,), nets.LipschitzMLP).eval()
    >>> x = torch.randn(5, 2)
    >>> bool((layer.inverse(layer(x)[0])[0] - x).abs().max() < 1e-5)
    True
    """

    traced = True

    def __init__(
        self,
        shape,
        net: Callable[..., nn.Module],
        trace: str = "auto",
        noise: str = "rademacher",
        exact_terms: int = 2,
        terms: str = "geometric",
        mean_terms: float = 1.0,
        max_steps: int = 1000,
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        for name, value in {"exact_terms": exact_terms, "max_steps": max_steps}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be a whole number of at least 1")
        if not 0 < mean_terms <= MOST_TERMS:
            raise ValueError(f"mean_terms={mean_terms} must be above 0, and at most {MOST_TERMS}")
        for name, choice, options in (
            ("trace", trace, ("auto", "exact", "hutchinson")),
            ("noise", noise, tuple(NOISE)),
            ("terms", terms, tuple(_SURVIVAL)),
        ):
            if choice not in options:
                raise ValueError(f"{name}='{choice}' must be one of {', '.join(options)}")
        self.trace, self.noise, self.terms = trace, noise, terms
        self.exact_terms, self.mean_terms, self.max_steps = exact_terms, mean_terms, max_steps
        network: Any = net(shape=self.shape, context_shape=context_shape)
        self.net, self.lipschitz = network, float(network.lipschitz)
        if not 0 <= self.lipschitz < 1:
            raise ValueError(f"lipschitz={self.lipschitz} of a residual layer's network must be below 1")

    def extra_repr(self):
        return f"{super().extra_repr()}, terms={self.terms}, trace={self.trace}"

    def forward(self, x, context=None):
        if torch.compiler.is_compiling():  # the number of terms is random, or depends on values: no graph
            return torch.compiler.disable(Residual.forward)(self, x, context)
        x = x.to(at_least_float32(x.dtype))
        with full_precision(x):
            if modes.current().states_only:
                return x + self.net(x, context), zero_log_det(x) + math.nan
            if not len(x):
                return x, zero_log_det(x)
            if self._is_exact:
                at, g = self._run(x, context)
                log_det = torch.linalg.slogdet(_plus_identity(self._jacobian(at, g, torch.is_grad_enabled())))[1]
                return x + (g if torch.is_grad_enabled() else g.detach()), log_det
            noises = [NOISE[self.noise](x) for _ in range(modes.current().probes)]
            if torch.is_grad_enabled():
                g, *found = _Estimate.apply(self, noises, x, context, *self.net.parameters())
            else:
                at, g = self._run(x, context)
                found = [self._series(at, g, noise)[0] for noise in noises]
            log_dets = torch.stack(found, 1)
            if (spreads := modes.current().spreads) is not None and len(noises) > 1:
                spreads.append(log_dets.detach().var(1) / len(noises))
            return x + (g if torch.is_grad_enabled() else g.detach()), log_dets.mean(1)

    @property
    def _is_exact(self) -> bool:
        if modes.current().exact_trace or self.trace == "exact":
            return True
        if self.training:
            return self.trace == "auto" and size(self.shape) <= EXACT_IN_TRAINING
        return size(self.shape) <= EXACT_LIMIT

    def _run(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The input at which there are gradients, and g of it."""
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            return x, self.net(x, context)

    # ---- log-determinants --------------------------------------------------------------------------------------------

    def _jacobian(self, x: Tensor, g: Tensor, differentiable: bool) -> Tensor:
        """∂g/∂x of each row, (B, D, D)."""
        rows = [
            torch.autograd.grad(g, x, part, retain_graph=True, create_graph=differentiable, is_grads_batched=True)[0]
            for part in rows_of_trace(x)
        ]
        return torch.cat(rows).flatten(2).transpose(0, 1)

    def _series(self, x: Tensor, g: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Σ cₖ (−1)^(k+1)/k vᵀJᵏv of each row, (B,), and w = Σ cₖ (−1)^(k+1) vᵀJ^(k−1), (B, *shape), without a graph.
        In training cₖ are the weights of the random series, else 1."""
        counts = torch.ones_like(zero_log_det(x))
        total, combined, pulled = torch.zeros_like(counts), torch.zeros_like(noise), noise  # pulled: vᵀJᵏ
        for k, weight in enumerate(self._random_weights() if self.training else repeat(1.0, LONGEST), 1):
            factor = counts * (weight if k % 2 else -weight)
            combined = combined + _along(factor, x) * pulled
            (pulled,) = torch.autograd.grad(g, x, pulled, retain_graph=True)
            total = total + factor / k * sum_event(pulled * noise)
            if not self.training:
                counts = counts * (self._rest(noise, pulled, k) > TRUNCATION)  # none of a row that is NaN
                if not counts.any():
                    break
        else:
            if not self.training:
                raise FloatingPointError(f"a residual layer ({self.extra_repr()}) has a power series {_UNUSABLE}")
        return total, combined

    def _random_weights(self) -> list[float]:
        """One for each term to compute: 1, or 1 over the probability that there are so many. The random number is the
        host's, so that it need not wait for a device."""
        u, survival = torch.rand((), dtype=torch.float64).item(), _SURVIVAL[self.terms](self.mean_terms)
        weights = [1.0] * self.exact_terms
        while (probability := next(survival)) > u:
            weights.append(1 / probability)
        return weights

    def _rest(self, noise: Tensor, pulled: Tensor, k: int) -> Tensor:
        """A bound of what the terms after the k-th one add, by the network's Lipschitz constant L: ‖v‖ ‖vᵀJᵏ‖
        Σ Lʲ/(k + 1), j = 1, 2, …."""
        lengths = sum_event(noise.square()).sqrt() * sum_event(pulled.square()).sqrt()
        return lengths * (self.lipschitz / (1 - self.lipschitz) / (k + 1))

    # ---- inverse -----------------------------------------------------------------------------------------------------

    def inverse(self, z, context=None):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(Residual.inverse)(self, z, context)
        z = z.to(at_least_float32(z.dtype))
        if not len(z):
            return z, zero_log_det(z)
        with full_precision(z):
            x = self._fixed_point(z, context)
            if torch.is_grad_enabled():
                x = self._with_gradient(x, z, context)
            return x, -self.forward(x, context)[1]

    @torch.no_grad()
    def _fixed_point(self, z: Tensor, context: Tensor | None) -> Tensor:
        """x with x + g(x) = z, to roundings. A contraction makes each step shorter than the last, until only roundings
        are left."""
        eps = torch.finfo(z.dtype).eps
        x, settled = z, torch.zeros(len(z), dtype=torch.bool, device=z.device)
        lost, before = ~_norm(z).isfinite(), _norm(z) + math.inf
        if self.training:
            self.net(z[:1], None if context is None else context[:1])  # updates its norms, which then stay
        with modes.repeat(modes.current()), nullcontext() if modes.current().kept is not None else kept.keep():
            for _ in range(self.max_steps):
                after = torch.where(_along(settled | lost, x), x, z - self.net(x, context))
                step, length = _norm(after - x), 1 + _norm(after)
                close = (step <= 4 * eps * length) | ((step >= before) & (step <= eps ** (2 / 3) * length))
                lost = lost | ~step.isfinite()
                settled, x, before = settled | close & ~lost, after, step
                if (settled | lost).all():
                    break
        if not (~settled & _norm(z).isfinite()).any():
            return x
        reason = (
            f"a residual layer ({self.extra_repr()}) has no fixed point after max_steps={self.max_steps} {_UNUSABLE}"
        )
        if (reasons := modes.current().unsolved) is None:
            raise FloatingPointError(reason)
        reasons.append(reason)
        return x + math.nan

    def _with_gradient(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """The fixed point x of z, with its gradient in z, the context and the weights."""
        at, g = self._run(x.detach(), context)
        if self._is_exact:
            transposed = _plus_identity(self._jacobian(at, g, False)).mT

            def solve(gradient: Tensor) -> Tensor:
                return torch.linalg.solve(transposed, gradient.reshape(*transposed.shape[:2], 1)).reshape(z.shape)

        else:

            def solve(gradient: Tensor) -> Tensor:
                """Σ (−1)ᵏ gradientᵀJᵏ, until the terms are roundings."""
                total, term, least = gradient, gradient, torch.finfo(gradient.dtype).eps * gradient.norm()
                for _ in range(self.max_steps):
                    (term,) = torch.autograd.grad(g, at, -term, retain_graph=True)
                    total = total + term
                    if not term.norm() > least:
                        break
                return total

        return _Solve.apply(z - self.net(x.detach(), context), solve)


_UNUSABLE = (
    "that converges: its network does not contract as it should; a smaller coeff of the network, or weights that are"
    " finite, may help"
)


class _Estimate(torch.autograd.Function):
    """g of x, and its log-determinant as each of the noises estimates it."""

    @staticmethod
    def forward(ctx, layer, noises, x, context, *parameters):
        at, g = layer._run(x, context)
        found = [layer._series(at, g, noise) for noise in noises]
        ctx.layer, ctx.modes = layer, modes.current()
        ctx.save_for_backward(x, context, *noises, *(combined for _, combined in found))
        return g.detach(), *(total for total, _ in found)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *estimates):
        """Of Σ wᵀJv with the gradients of the estimates for weights, and of g."""
        x, context, *vectors = ctx.saved_tensors
        layer, many = ctx.layer, len(vectors) // 2
        sources = [None if one is None else one.detach().requires_grad_() for one in (x, context)]
        with torch.enable_grad(), full_precision(x), modes.repeat(ctx.modes):
            g = layer.net(*sources)
            outputs, weights = [g], [gradient]
            for noise, combined, weight in zip(vectors[:many], vectors[many:], estimates):
                (product,) = torch.autograd.grad(g, sources[0], combined, create_graph=True)
                outputs.append(sum_event(product * noise))
                weights.append(weight)
            wanted = [one for one in (*sources, *layer.net.parameters()) if one is not None and one.requires_grad]
            each = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))
        inputs = *sources, *layer.net.parameters()
        return None, None, *(next(each) if one is not None and one.requires_grad else None for one in inputs)


class _Solve(torch.autograd.Function):
    """The identity, whose gradient goes through ``solve``."""

    @staticmethod
    def forward(ctx, x, solve):
        ctx.solve = solve
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.solve(gradient), None


def _geometric(mean: float) -> Iterator[float]:
    """P(N ≥ 1), P(N ≥ 2), … of a geometric number N of ``mean``: the powers of mean/(1 + mean)."""
    share = probability = mean / (1 + mean)
    while True:
        yield probability
        probability *= share


def _poisson(mean: float) -> Iterator[float]:
    """The same of a Poisson number; 0 where roundings leave nothing of it."""
    n, probability, left = 0, math.exp(-mean), 1.0
    while True:
        left -= probability
        yield max(left, 0.0)
        n += 1
        probability *= mean / n


_SURVIVAL = {"geometric": _geometric, "poisson": _poisson}


def _plus_identity(jacobian: Tensor) -> Tensor:
    return jacobian + torch.eye(jacobian.shape[1], device=jacobian.device, dtype=jacobian.dtype)


def _along(numbers: Tensor, x: Tensor) -> Tensor:
    """(B,) with as many axes as x."""
    return numbers.view(-1, *[1] * (x.dim() - 1))


def _norm(x: Tensor) -> Tensor:
    """Of each row, (B,), without squares that overflow."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
