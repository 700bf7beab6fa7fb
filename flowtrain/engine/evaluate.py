"""The likelihood of a flow on a split of the data, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from flowtrain.engine.precision import exact_arithmetic
from flowtrain.flow import Flow, to_bits_per_dim
from flowtrain.runtime import global_batch, kept, modes
from flowtrain.runtime.interrupts import interruptible_batches
from flowtrain.runtime.noise import ExampleNoise
from flowtrain.runtime.seeds import TURN, seed_from

Measure = Callable[[Flow, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Mean and standard error over examples, each averaged over its draws of dequantization noise. A single example
    has no standard error: None.

    With weights they are m = Σ wᵢ xᵢ / Σ wᵢ and √(n/(n − 1) Σ wᵢ² (xᵢ − m)²) / Σ wᵢ, the standard error of a ratio of
    two sums (Cochran 1977, chapter 6); n is ``examples``, the number of those of positive weight. If each example came
    wᵢ times, the mean would be the same and the standard error smaller, as if copies were evidence.

    ``bits_per_dim_iw`` and ``log_likelihood_iw`` belong to the importance-weighted bound log(1/K Σ p_k) of K draws
    (Burda et al. 2016, eq. 8), with the standard error of its mean over examples; None for one draw. It is a bound only
    where each p_k is an unbiased estimate. That of a stochastic trace is not: it is unbiased for log p_k.

    ``probes_stderr`` is the part of the standard error that noises of stochastic traces make, in nats, and
    ``trace_variance`` the mean over examples of the variance of log p from one of them: see
    :func:`flowtrain.bijections.ode.several_probes`. Both are 0 where they were not measured.

    ``each`` (N,) float64 holds the log-likelihood of every example of the split in nats, the mean over its draws, by
    its index; NaN for those that were not evaluated.
    """

    bits_per_dim: float
    bits_per_dim_stderr: float | None
    log_likelihood: float
    log_likelihood_stderr: float | None
    examples: int
    draws: int
    each: Tensor = field(compare=False, repr=False)
    probes_stderr: float = 0.0
    trace_variance: float = 0.0
    bits_per_dim_iw: float | None = None
    bits_per_dim_iw_stderr: float | None = None
    log_likelihood_iw: float | None = None
    log_likelihood_iw_stderr: float | None = None


@torch.no_grad()
def evaluate(
    flow: Flow,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    total: int,
    draws: int = 1,
    seed: int = 0,
    weights: Tensor | None = None,
    measure: Measure = Flow.__call__,
    zeros: bool = False,
) -> Evaluation:
    """Evaluate ``flow`` on batches (indices, x, context); over all processes they hold each of ``total`` examples at
    most once.

    The noise of an example is a function of (seed, its index, draw): the same in each evaluation, whatever the batches
    and the number of processes. ``weights`` (total,) say how much each example counts; None: all alike. With ``zeros``
    a likelihood may be 0, its logarithm −∞; the mean then is, and has no standard error.

    Raises:
        FloatingPointError: a likelihood is not a number, or no example counts.
    """
    was_training = flow.training
    flow.eval()
    device = next(flow.parameters()).device
    mean, weighted, evaluated = torch.zeros(3, total, dtype=torch.float64, device=device)
    with evaluation_mode(device):
        for index, x, context in interruptible_batches(batches):
            index = index.to(device)
            mean[index], weighted[index] = log_likelihoods(flow, index, x, context, draws, seed, measure)
            evaluated[index] = 1
    flow.train(was_training)
    if dist.is_initialized():
        for one in (mean, weighted, evaluated):
            dist.all_reduce(one)
    return summarize(mean, weighted, evaluated, weights, flow.dimensions, draws, zeros)


def summarize(
    mean: Tensor,
    weighted: Tensor,
    evaluated: Tensor,
    weights: Tensor | None,
    dimensions: int,
    draws: int = 1,
    zeros: bool = False,
) -> Evaluation:
    """The evaluation of examples from what :func:`log_likelihoods` returned for each, (N,), and whether it was
    evaluated (1 or 0). Raises FloatingPointError as :func:`evaluate` does.
    """
    weights = torch.ones_like(mean) if weights is None else weights.to(mean)
    found = (evaluated > 0) & (weights > 0)  # an unreadable image may be left out
    good = mean.isfinite() | (mean == -math.inf) if zeros else mean.isfinite()
    total, bad = int(found.sum()), (found & ~good).nonzero().flatten().tolist()
    if not total:
        raise FloatingPointError("there is no likelihood: none of the examples counts")
    if bad:
        raise FloatingPointError(f"the likelihood of {len(bad)} of {total} examples is not finite, first: {bad[:5]}")
    each = mean.where(evaluated > 0, math.nan).cpu()
    figures = _figures(mean[found], weights[found], dimensions)
    if draws > 1:
        figures |= _figures(weighted[found], weights[found], dimensions, "_iw")
    return Evaluation(**figures, examples=total, draws=draws, each=each)


def _figures(values: Tensor, weights: Tensor, dimensions: int, kind: str = "") -> dict[str, float | None]:
    """The weighted mean of log-likelihoods with its standard error, in both units, by the names of
    :class:`Evaluation`."""
    count, total = len(values), weights.sum().item()
    nats = ((values * weights).sum() / weights.sum()).item()
    squares = (weights * (values - nats)).square().sum().item()
    has_error = count > 1 and math.isfinite(nats)
    stderr = math.sqrt(squares * count / (count - 1)) / total if has_error else None
    return {
        f"bits_per_dim{kind}": to_bits_per_dim(nats, dimensions),
        f"bits_per_dim{kind}_stderr": None if stderr is None else -to_bits_per_dim(stderr, dimensions),
        f"log_likelihood{kind}": nats,
        f"log_likelihood{kind}_stderr": stderr,
    }


def plus_minus(value: float, error: float | None, digits: int = 4) -> str:
    """A figure with its error, if it has one.

    >>> plus_minus(3.14159, 0.002), plus_minus(3.14159, None, 2)
    ('3.1416 ± 0.0020', '3.14')
    """
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def log_likelihoods(
    flow: Flow,
    index: Tensor,
    x: Tensor,
    context: Tensor | None = None,
    draws: int = 1,
    seed: int = 0,
    measure: Measure = Flow.__call__,
) -> tuple[Tensor, Tensor]:
    """log p of the examples numbered ``index``, and the logarithm of p, each averaged over the draws of their noise:
    float64 (B,)."""
    mean = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    total = torch.full_like(mean, -math.inf)
    for log_prob in over_draws(lambda: measure(flow, x, context), index, draws, seed):
        mean += log_prob / draws
        total = torch.logaddexp(total, log_prob)
    return mean, total - math.log(draws)


def without_label(classes: int) -> Measure:
    """log p(x) = log of the mean of p(x | class) over the classes, each as likely, with the same noise for each: what
    a class-conditional flow says of an example whose class is not known. It takes a pass for each class."""

    def measure(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
        noise = modes.current().noise
        each = []
        for one in torch.eye(classes).to(context):
            with modes.using(
                noise=ExampleNoise(noise.index, *noise.seed) if isinstance(noise, ExampleNoise) else noise
            ):
                each.append(flow(x, one.expand(len(x), classes)).double())
        return torch.stack(each).logsumexp(0) - math.log(classes)

    return measure


def over_draws(compute: Callable[[], Tensor], index: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """What ``compute`` returns of the examples numbered ``index``, in float64, for each draw of their noise."""
    for draw in range(draws):
        torch.manual_seed(seed_from(seed, draw))  # for layers of the user's own
        with global_batch.examples(index, seed, draw):
            result = compute().double()
        yield result


@contextmanager
def evaluation_mode(device: torch.device):
    """Within it, arithmetic is exact, what follows from weights alone is kept, and torch's generators are this thread's
    alone and stay as they were."""
    with TURN, torch.random.fork_rng([device] if device.type == "cuda" else []), exact_arithmetic(), kept.keep():
        yield
