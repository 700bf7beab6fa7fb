"""What importance weights say of a flow as an approximation of a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 25  # weights whose largest, five, have a shape


@dataclass(frozen=True)
class Figure:
    """A number with its standard error."""

    value: float
    stderr: float


def log_z(log_w: Tensor) -> Figure:
    """log Z, the logarithm of the mean of w over n samples of the flow, (n,), with its error by the delta method,
    √(var w / n) / mean w.

    >>> log_z(torch.full((10,), 2.0, dtype=torch.float64))
    Figure(value=2.0, stderr=0.0)
    """
    w = _weights(log_w)
    value = log_w.logsumexp(0).item() - math.log(len(log_w))
    return Figure(value, _stderr(w / w.mean()))


def effective_share(log_w: Tensor) -> Figure:
    """ESS/n = (Σ w)²/(n Σ w²) of samples of the flow (Kish 1965), with its error by the delta method.

    It is 1 where the flow is the target. It cannot see what no sample has reached.

    >>> effective_share(torch.zeros(10))
    Figure(value=1.0, stderr=0.0)
    """
    w = _weights(log_w)
    first, second = w.mean(), w.square().mean()
    value = (first.square() / second).item()
    return Figure(value, value * _stderr(2 * w / first - w.square() / second))


def forward_effective_share(log_w: Tensor) -> Figure:
    """ESS/n of the flow from exact samples of the target, (n,): 1/(E_p[w] E_p[1/w]), with its error by the delta method
    (Nicoli et al. 2021). It is small where the flow misses a part of the target.

    >>> forward_effective_share(torch.zeros(10))
    Figure(value=1.0, stderr=0.0)
    """
    w, inverse = _weights(log_w), _weights(-log_w)
    shift = (log_w.max() - log_w.min()).item()
    value = math.exp(-(w.mean().log() + inverse.mean().log()).item() - shift)
    return Figure(value, value * _stderr(w / w.mean() + inverse / inverse.mean()))


def pareto_shape(log_w: Tensor) -> float:
    """k of a generalized Pareto distribution fitted to the largest of n weights, those above the min(n/5, 3√n) largest
    (Vehtari et al. 2024, by the estimator of Zhang and Stephens 2009 with that paper's prior).

    The weights have moments of order below 1/k: above 0.5 no variance. Above 0.7 means of them, log Z and ESS, and
    their standard errors are not reliable, since what matters has not been sampled. 0 where the largest are equal.

    Raises:
        ValueError: fewer than 25 weights.

    >>> u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    >>> round(pareto_shape(-0.5 * u.log()), 1)  # w = u^−½
    0.5
    """
    n = len(log_w)
    if n < FEWEST:
        raise ValueError(f"{n} weights are too few for the tail of their distribution: give at least {FEWEST}")
    m = int(min(n / 5, 3 * math.sqrt(n)))
    largest = log_w.double().topk(m + 1).values.flip(0)
    excess = (largest[1:] - largest[-1]).exp() - (largest[0] - largest[-1]).exp()
    if excess[-1] == 0:
        return 0.0
    excess = excess.clamp(min=torch.finfo(excess.dtype).tiny)  # the largest may be any number of times the others
    candidates = 30 + int(math.sqrt(m))
    i = torch.arange(1, candidates + 1, dtype=torch.float64)
    slopes = 1 / excess[-1] + (1 - (candidates / (i - 0.5)).sqrt()) / (3 * excess[int(m / 4 + 0.5) - 1])
    shapes = torch.log1p(-slopes[:, None] * excess).mean(1)
    likelihood = m * ((-slopes / shapes).log() - shapes - 1)
    slope = (slopes * likelihood.softmax(0)).sum()
    shape = torch.log1p(-slope * excess).mean().item()
    return (m * shape + 5) / (m + 10)


def acceptance(log_w: Tensor) -> float:
    """The acceptance rate of independence Metropolis with the flow as proposal, in its stationary state: the mean of
    min(1, w′/w) over w of the target and w′ of the flow, Σᵢⱼ min(wᵢ, wⱼ)/(n Σ w) for n samples of the flow.

    >>> acceptance(torch.zeros(10))
    1.0
    """
    w = _weights(log_w).sort().values
    n = len(w)
    times = 2 * torch.arange(n - 1, -1, -1, dtype=w.dtype) + 1  # that each number is the smaller of a pair
    return min(1.0, ((w * times).sum() / (n * w.sum())).item())


def _weights(log_w: Tensor) -> Tensor:
    """The weights over the greatest of them."""
    return (log_w.double() - log_w.max()).exp()


def _stderr(values: Tensor) -> float:
    return math.sqrt(values.var().item() / len(values))
