"""The eight schools."""

from __future__ import annotations

import math

import numpy as np
import torch

from flowtrain.targets.grid import LineGrid
from flowtrain.targets.target import Target

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


class EightSchools(Target):
    """The posterior of Rubin's eight schools (Gelman et al. 2013, section 5.5) in its non-centred form: x = (μ, log τ,
    η₁ … η₈), with yᵢ ~ N(μ + τηᵢ, σᵢ²), ηᵢ ~ N(0, 1), μ ~ N(0, 5²), τ ~ half-Cauchy(5).

    Given τ all is normal. So log Z, the evidence, and exact samples come from a grid of log τ.

    >>> round(EightSchools().log_z, 3)
    -31.311
    """

    name, dimensions = "eight_schools", 10
    names = ("mu", "log_tau", *(f"eta{i}" for i in range(1, 9)))

    def __init__(self):
        self.y, self.errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)
        self.grid = LineGrid(self._log_density_of_log_tau, -30.0, 12.0)
        self.log_z = self.grid.log_z

    def log_prob(self, x):
        mu, log_tau, eta = x[:, 0], x[:, 1], x[:, 2:]
        tau = log_tau.exp()
        prior = -0.5 * (mu / 5).square() - math.log(5) - 0.5 * eta.square().sum(1)
        # of the half-Cauchy, and of log τ: 2/(5π (1 + (τ/5)²)) · τ
        prior = prior + math.log(2 / (5 * math.pi)) - torch.log1p((tau / 5).square()) + log_tau
        y, errors = self.y.to(x), self.errors.to(x)
        likelihood = -0.5 * ((y - mu[:, None] - tau[:, None] * eta) / errors).square().sum(1)
        return prior + likelihood - errors.log().sum() - 8.5 * math.log(2 * math.pi)

    def sample(self, n, generator=None):
        tau = self.grid.sample(n, generator).exp()[:, None]
        y, errors = self.y.double(), self.errors.double()
        precision, mean = _moments_of_mu(tau, y, errors)
        mu = mean + torch.randn(n, generator=generator, dtype=torch.float64) / precision.sqrt()
        of_eta = 1 + (tau / errors).square()  # the precision of each ηᵢ given μ and τ
        centre = tau * (y - mu[:, None]) / errors.square() / of_eta
        eta = centre + torch.randn(n, 8, generator=generator, dtype=torch.float64) / of_eta.sqrt()
        return torch.cat([mu[:, None], tau.log(), eta], 1).float()

    def _log_density_of_log_tau(self, log_tau: np.ndarray) -> np.ndarray:
        """log p(y, log τ), with μ and η integrated out."""
        tau = torch.from_numpy(log_tau).exp()[:, None]
        y, errors = self.y.double(), self.errors.double()
        precision, mean = _moments_of_mu(tau, y, errors)
        variances = errors.square() + tau.square()
        of_y = -0.5 * (y.square() / variances + variances.log()).sum(1) - 4 * math.log(2 * math.pi)
        of_mu = 0.5 * (precision * mean.square() - precision.log()) - math.log(5)
        of_tau = math.log(2 / (5 * math.pi)) - torch.log1p((tau[:, 0] / 5).square()) + tau[:, 0].log()
        return (of_y + of_mu + of_tau).numpy()


def _moments_of_mu(tau, y, errors):
    """Precision and mean of μ given τ and y, (n,) each."""
    weights = 1 / (errors.square() + tau.square())
    precision = weights.sum(1) + 1 / 25
    return precision, (weights * y).sum(1) / precision
