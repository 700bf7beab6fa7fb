"""Conformal p-values: how unusual a score is among the scores of rows that a model was not fitted to."""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv
from torch import Tensor


class Conformal:
    """Calibration scores, with which new ones are compared; low scores are unusual.

    Where the calibration rows and a new row are exchangeable, as independent rows of one distribution are, and the
    score was chosen without them, P(p ≤ α) ≤ α for every α, whatever the score (Vovk, Gammerman and Shafer 2005,
    chapter 2; Bates et al. 2023). That is on average over calibration samples; :meth:`alarm_rates` says how far one of
    them may be off.

    Args:
        scores: of the calibration rows, (n,).

    Raises:
        ValueError: there are none, or one is NaN.

    >>> calibrated = Conformal(torch.arange(1.0, 100.0))
    >>> calibrated.p_values(torch.tensor([0.0, 1.0, 50.0, 1000.0]))
    tensor([0.0100, 0.0200, 0.5100, 1.0000], dtype=torch.float64)
    """

    def __init__(self, scores: Tensor):
        if not len(scores) or scores.isnan().any():
            raise ValueError(f"{len(scores)} calibration scores: there must be one, and none that is not a number")
        self.scores = scores.detach().double().cpu().sort().values

    def __len__(self) -> int:
        return len(self.scores)

    def p_values(self, scores: Tensor) -> Tensor:
        """p = (1 + #{calibration scores ≤ score}) / (n + 1), float64 (B,). Ties count as at least as unusual, so that p
        is valid where scores repeat."""
        return (1 + self._below(scores, ties=True)) / (len(self) + 1)

    def two_sided(self, scores: Tensor) -> Tensor:
        """min(1, twice the smaller of the p-values for low and for high scores), float64 (B,): valid by the union
        bound."""
        high = (1 + len(self) - self._below(scores, ties=False)) / (len(self) + 1)
        return (2 * torch.minimum(self.p_values(scores), high)).clamp(max=1)

    def unusual(self, scores: Tensor) -> Tensor:
        """The share of calibration scores that are higher, ties counting half, float64 (B,): its mean over anomalies is
        the area under the ROC curve (AUROC) of telling them from calibration rows."""
        ties = self._below(scores, ties=True) + self._below(scores, ties=False)
        return 1 - ties / (2 * len(self))

    def alarm_rates(self, level: float, confidence: float = 0.95) -> tuple[float, float]:
        """The range that holds the rate at which usual rows have p ≤ ``level`` for such a number of calibration rows:
        it does for a share ``confidence`` of all calibration samples.

        With k = ⌊level·(n + 1)⌋ the rate is Beta(k, n + 1 − k) distributed where scores do not repeat (Vovk 2012), and
        no larger where they do. With k = 0 it is 0, as no p-value is so small.

        >>> [round(rate, 4) for rate in Conformal(torch.randn(20_000)).alarm_rates(0.01)]
        [0.0087, 0.0114]
        """
        n = len(self)
        k = math.floor(level * (n + 1))
        k += (k + 1) / (n + 1) <= level  # as p_values rounds it
        tail = (1 - confidence) / 2
        return tuple(float(betaincinv(k, n + 1 - k, share)) for share in (tail, 1 - tail)) if k else (0.0, 0.0)

    def _below(self, scores: Tensor, ties: bool) -> Tensor:
        """How many calibration scores are below each, with ``ties`` or equal to it, float64 (B,)."""
        return torch.searchsorted(self.scores, scores.detach().double().cpu().contiguous(), right=ties).double()
