"""What a run minimizes and what it reports: bits per dimension of integers, nats per row of real numbers."""

from __future__ import annotations

from torch import Tensor

from flowtrain.engine.evaluate import Evaluation
from flowtrain.flow import to_bits_per_dim


class BitsPerDim:
    """Of images and other integers: lower is better."""

    key, unit = "bits_per_dim", "bits/dim"

    def loss(self, log_prob: Tensor, dimensions: int) -> Tensor:
        """What training minimizes, of each example's log-likelihood in nats."""
        return to_bits_per_dim(log_prob, dimensions)

    def reported(self, loss: float, dimensions: int) -> float:
        """A mean loss as people read it."""
        return loss

    def judged(self, result: Evaluation) -> tuple[float, float, str]:
        """An evaluation as a loss, as the figure people read, and as text."""
        value, stderr = result.bits_per_dim, result.bits_per_dim_stderr
        return value, value, f"{value:.4f} ± {stderr:.4f} bits/dim"


class NatsPerRow:
    """Of rows of real numbers, whose density has no bits: the mean log-likelihood, higher is better.

    The loss is its negative per dimension, so that rates and clipping suit any number of columns.
    """

    key, unit = "log_likelihood", "nats"

    def loss(self, log_prob: Tensor, dimensions: int) -> Tensor:
        return -log_prob / dimensions

    def reported(self, loss: float, dimensions: int) -> float:
        return -loss * dimensions

    def judged(self, result: Evaluation) -> tuple[float, float, str]:
        value, stderr = result.log_likelihood, result.log_likelihood_stderr
        return -value, value, f"{value:.4f} ± {2 * stderr:.4f} nats (2 standard errors)"


Measure = BitsPerDim | NatsPerRow


def measure_of(levels: int | None) -> Measure:
    """That of data with so many levels; None is real numbers."""
    return BitsPerDim() if levels else NatsPerRow()
