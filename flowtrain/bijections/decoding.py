"""How autoregressive layers are inverted: one element after the other or all at once, and with or without guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections.bijection import full_precision
from flowtrain.bijections.univariate import Univariate
from flowtrain.runtime import modes

ROUNDS = 4  # between two reads of the residual, for which the host waits for a device
LEAST, ENOUGH = 16, 512  # elements of a window on a CPU: of one example, and of the whole batch together


class Solve(NamedTuple):
    """The inverse of one layer: rounds, of at most ``elements``, and the greatest |forward(x) − z| that is left."""

    rounds: int
    elements: int
    residual: float


@dataclass
class Jacobi:
    """Inverses by Jacobi iteration, and what each took.

    Attributes:
        tolerance: of the residual at which a layer's iteration stops.
        solves: one for each inverse so far.
    """

    tolerance: float
    solves: list[Solve] = field(default_factory=list)

    @property
    def residual(self) -> float:
        """The greatest of all inverses, NaN if one is; 0 without any."""
        return torch.tensor([0.0, *[solve.residual for solve in self.solves]]).max().item()

    def __str__(self) -> str:
        rounds, elements = (sum(counts) for counts in list(zip(*self.solves))[:2]) if self.solves else (0, 0)
        return f"{rounds:,} rounds for {elements:,} steps, residual {self.residual:.1e}"

    def solve(self, net: Any, univariate: Univariate, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x with τ(x; net(x, context)) = z, and log dx/dz of each of its numbers.

        Every round computes a window of elements, each from those of the round before (Song et al. 2021). The first of
        them depends on no guess: so each round settles it, and also those after it whose residual is small enough.
        There are at most as many rounds as elements, and far fewer where elements depend little on each other. A
        network with a method ``look`` computes the window alone, with a cache of what is settled, any other all.
        """
        elements, x = z.shape[1], z.clone()
        on_cpu, cache = z.device.type == "cpu", net.init_cache(z, context) if hasattr(net, "look") else None
        width = max(LEAST, ENOUGH // max(1, len(z))) if on_cpu and cache is not None else elements
        settled, rounds, residuals, log_derivatives = 0, 0, [], []
        while settled < elements:
            window = slice(settled, min(settled + width, elements))
            for _ in range(1 if on_cpu else ROUNDS):
                rounds += 1
                guess = x[:, window]
                x[:, window] = guess = torch.where(guess.isfinite(), guess, 0.0)  # infinity times 0 would not be 0
                theta = net(x, context)[:, window] if cache is None else net.look(x, window, cache)
                theta = theta.to(z.dtype)
                with full_precision(z):
                    found, forward = univariate(guess, theta)
                    new, inverse = univariate.inverse(z[:, window], theta)
                residual = _greatest(found - z[:, window])
                right = (residual <= self.tolerance).long().cumprod(0)
                x[:, window] = torch.where(right.view(-1, *[1] * (x.dim() - 2)) > 0, guess, new)
            kept = int(right.sum())
            residuals.append(residual[:kept])
            log_derivatives.append(-forward[:, :kept])
            if kept < len(right):  # the next depended on no guess any more, and has its value
                one = slice(kept, kept + 1)
                with full_precision(z):
                    found, _ = univariate(new[:, one], theta[:, one])
                residuals.append(_greatest(found - z[:, window][:, one]))
                log_derivatives.append(inverse[:, one])
                kept += 1
            settled += kept
        self.solves.append(Solve(rounds, elements, torch.cat(residuals).amax().item()))
        return x, torch.cat(log_derivatives, 1)


def _greatest(difference: Tensor) -> Tensor:
    """Of each element, (B, m, …): (m,)."""
    each = difference.abs().movedim(1, 0).flatten(1)
    return each.amax(1) if each.shape[1] else each.new_zeros(len(each))


@contextmanager
def jacobi(tolerance: float = 1e-4) -> Iterator[Jacobi]:
    """Within it, autoregressive layers are inverted by Jacobi iteration, where no gradient is needed.

    Args:
        tolerance: greatest |forward(x) − z| of a number at which a layer's iteration stops.

    Raises:
        ValueError: ``tolerance`` below 0.

    >>> from flowtrain import flows
    >>> flow = flows.maf((3,), hidden=16).eval()
    >>> with jacobi() as inverses:
    ...     x = flow.sample(5)
    >>> inverses.residual <= 1e-4, len(inverses.solves)
    (True, 5)
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0")
    record = Jacobi(tolerance)
    with modes.using(jacobi=record):
        yield record


def guidance(weight: float) -> AbstractContextManager[None]:
    """Within it, autoregressive layers with a context are inverted as if their conditionals were
    p(x | c)·(p(x | c)/p(x))ʷ, where w = ``weight`` and p(x) is the conditional for a context of zeros: samples are more
    typical of their class.

    For Gaussian conditionals N(μ, σ²) of affine maps and r = min(σ_c²/σ_u², 1) that is the Gaussian of precision
    (1 + w − w·r)/σ_c² around μ_c + w·r·(μ_c − μ_u)/(1 + w − w·r) (Gu et al. 2025); for equal σ it is
    the guidance of Zhai et al. (2024). The flow should have been trained with some contexts hidden; see
    :class:`flowtrain.nets.HiddenContext`. Densities stay those of the flow: the samples are not its own any more.

    Raises:
        ValueError: ``weight`` below 0; in an inverse, a map that is not affine.

    >>> from flowtrain import flows
    >>> flow = flows.tarflow((1, 4, 4), hidden=8, context_shape=(3,), hide_context=0.1).eval()
    >>> with guidance(2.0):
    ...     flow.sample(5, torch.eye(3)[0]).shape
    torch.Size([5, 1, 4, 4])
    """
    if not weight >= 0:
        raise ValueError(f"guidance={weight} must be at least 0")
    return modes.using(guidance=float(weight))


class Guided:
    """A conditioner whose parameters are guided: it runs ``net`` on each example with its context and with zeros."""

    def __init__(self, net: Any, univariate: Univariate, weight: Tensor):
        self.net, self.univariate, self.weight = net, univariate, weight

    def __call__(self, x, context):
        return self._guide(self.net(_twice(x), _and_zeros(context)))

    def init_cache(self, x: Tensor, context: Tensor):
        return self.net.init_cache(_twice(x), _and_zeros(context))

    def step(self, x: Tensor, cache) -> Tensor:
        return self._guide(self.net.step(_twice(x), cache))

    def look(self, x: Tensor, window: slice, cache) -> Tensor:
        return self._guide(self.net.look(_twice(x), window, cache))

    def _guide(self, theta: Tensor) -> Tensor:
        conditional, unconditional = theta.chunk(2)
        return self.univariate.guide(conditional, unconditional, self.weight)


def _twice(x: Tensor) -> Tensor:
    return torch.cat((x, x))


def _and_zeros(context: Tensor) -> Tensor:
    return torch.cat((context, torch.zeros_like(context)))
