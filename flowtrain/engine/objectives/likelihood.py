"""Maximum likelihood: bits per dimension of integers, nats per row of real numbers."""

from __future__ import annotations

from flowtrain.engine.evaluate import Evaluation, plus_minus
from flowtrain.engine.objectives.objective import Objective, Score
from flowtrain.flow import to_bits_per_dim


def maximum_likelihood(grey_levels: int | None) -> BitsPerDim | NatsPerRow:
    """The objective for integers of ``grey_levels`` values, or for real numbers (None)."""
    return BitsPerDim() if grey_levels else NatsPerRow()


class BitsPerDim(Objective):
    """For images and other integers: −log p(x) / (D ln 2), lower is better."""

    key, unit = "bits_per_dim", "bits/dim"

    def loss(self, flow, batch):
        return to_bits_per_dim(flow(*batch), flow.dimensions)

    def figure(self, flow, loss):
        return loss

    def score(self, evaluation: Evaluation) -> Score:
        value = evaluation.bits_per_dim
        return Score(value, value, f"{plus_minus(value, evaluation.bits_per_dim_stderr)} bits/dim")


class NatsPerRow(Objective):
    """For rows of real numbers, whose density has no bits: the mean log-likelihood in nats, higher is better.

    The loss is its negative per dimension, so that rates and clipping suit any number of columns.
    """

    key, unit = "log_likelihood", "nats"

    def loss(self, flow, batch):
        return -flow(*batch) / flow.dimensions

    def figure(self, flow, loss):
        return -loss * flow.dimensions

    def score(self, evaluation: Evaluation) -> Score:
        value, stderr = evaluation.log_likelihood, evaluation.log_likelihood_stderr
        text = f"{value:.4f} nats" if stderr is None else f"{plus_minus(value, 2 * stderr)} nats (2 standard errors)"
        return Score(-value, value, text)
