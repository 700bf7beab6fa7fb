"""Is a conditional density calibrated? Ranks, coverage and distances that would be uniform if it were."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.flow import Flow
from flowtrain.runtime import seeds

LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Places:
    """Where each true value lies among the draws of its posterior: shares in [0, 1], uniform if it is calibrated.

    Attributes:
        ranks: the share of the draws below it in each parameter, (N, D): simulation-based calibration (Talts et al.
            2018, algorithm 1).
        credibility: the share of the draws with a greater density, (N,): the least level of the highest-density regions
            that have it.
        distance: the share of the draws nearer to a random point, (N,): TARP (Lemos et al. 2023, algorithm 2).
    """

    ranks: Tensor
    credibility: Tensor
    distance: Tensor


@torch.no_grad()
def places(flow: Flow, truth: Tensor, batches: Iterator[Tensor], context: Tensor | None, seed: int) -> Places:
    """The places of N true rows (N, D) among draws of the flow.

    Args:
        batches: the draws of some of the rows after the other, (n, L, D) each, N rows in all.
        context: (N, *context_shape), or None.
        seed: of the random points, and of the place of a value within the share of one draw, without which ranks are
            not quite uniform.

    A share is (the number of draws below + a uniform number) / (L + 1).
    """
    device, random = next(flow.parameters()).device, seeds.generator(seed, 0)
    low, high = truth.amin(0), truth.amax(0)
    points = low + (high - low) * torch.rand(truth.shape, generator=random)
    unit = (high - low).clamp(min=torch.finfo(truth.dtype).tiny)
    found, start = [], 0
    with evaluation_mode(device):
        for draws in batches:
            here, count = slice(start, start + len(draws)), draws.shape[1]
            start += len(draws)
            own, point = truth[here, None], points[here, None]
            given = None if context is None else context[here].to(device)
            density = _log_prob(flow, torch.cat([own, draws], 1).to(device), given).cpu()
            distance = (torch.cat([own, draws], 1) - point).div(unit).square().sum(2)
            below = torch.cat(
                [
                    (draws < own).sum(1),
                    (density[:, 1:] > density[:, :1]).sum(1, keepdim=True),
                    (distance[:, 1:] < distance[:, :1]).sum(1, keepdim=True),
                ],
                1,
            )
            found.append((below + torch.rand(below.shape, generator=random, dtype=torch.float64)) / (count + 1))
    shares = torch.cat(found)
    return Places(shares[:, :-2], shares[:, -2], shares[:, -1])


def _log_prob(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """log p of x (n, L, D), (n, L)."""
    rows = None if context is None else context.repeat_interleave(x.shape[1], 0)
    return flow(x.flatten(0, 1), rows).unflatten(0, x.shape[:2])


@dataclass(frozen=True)
class Uniformity:
    """Attributes:
    distance: greatest difference between the distribution function of the shares and a uniform one's.
    p_value: of the Kolmogorov-Smirnov test: how often calibrated shares lie as far off or farther.
    """

    distance: float
    p_value: float


def uniformity(shares: Tensor) -> Uniformity:
    """The Kolmogorov-Smirnov test of shares (N,) for a uniform distribution.

    >>> uniformity(torch.linspace(0.001, 0.999, 500)).p_value > 0.99, uniformity(torch.full((9,), 0.5)).p_value < 0.05
    (True, True)
    """
    from scipy.stats import kstest

    found = kstest(shares.numpy(), "uniform")
    return Uniformity(float(found.statistic), float(found.pvalue))


def curve(shares: Tensor) -> np.ndarray:
    """For each level of ``LEVELS`` how many of the shares (N,) are not above it: the coverage of regions of that
    level."""
    return np.searchsorted(np.sort(shares.numpy()), LEVELS, side="right") / len(shares)


def band(count: int, levels: np.ndarray = LEVELS, certainty: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Between which shares of ``count`` trials lie, with that certainty at each level, if their chance is the level."""
    from scipy.stats import binom

    tail = (1 - certainty) / 2
    return binom.ppf(tail, count, levels) / count, binom.ppf(1 - tail, count, levels) / count


def c2st(reference: np.ndarray, samples: np.ndarray, seed: int = 1) -> float:
    """How often a classifier tells samples (n, D) from reference samples (m, D): 0.5 is never (Lopez-Paz and Oquab
    2017).

    The classifier and its folds are those of sbibm (Lueckmann et al. 2021): two layers of 10·D units, five folds,
    columns standardized by the reference.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, std = reference.mean(0), reference.std(0, ddof=1)
    rows = (np.concatenate([reference, samples]) - mean) / std
    labels = np.repeat([0, 1], [len(reference), len(samples)])
    hidden = 10 * rows.shape[1]
    classifier = MLPClassifier((hidden, hidden), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, rows, labels, cv=folds, scoring="accuracy").mean())
