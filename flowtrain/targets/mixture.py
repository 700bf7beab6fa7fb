"""Forty normals in the plane."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from flowtrain.targets.target import Target


class Mixture40(Target):
    """Forty equal round normals in the plane, with means drawn uniformly from [−40, 40]² and a standard deviation of
    1.313 (Midgley et al. 2023, section 4.1). Normalized: log Z = 0.

    >>> target = Mixture40()
    >>> len(target.mode_of(target.sample(1000)).unique())
    40
    """

    name, dimensions, scale, log_z, modes = "mixture40", 2, 25.0, 0.0, 40

    def __init__(self):
        self.means = 80 * (torch.rand(self.modes, 2, generator=torch.Generator().manual_seed(0)) - 0.5)
        self.std = F.softplus(torch.tensor(1.0)).item()

    def log_prob(self, x):
        squares = (x[:, None] - self.means.to(x)).square().sum(2)
        constant = math.log(self.modes) + 2 * math.log(self.std) + math.log(2 * math.pi)
        return (-0.5 * squares / self.std**2).logsumexp(1) - constant

    def sample(self, n, generator=None):
        which = torch.randint(self.modes, (n,), generator=generator)
        return self.means[which] + self.std * torch.randn(n, 2, generator=generator)

    def mode_of(self, x):
        """The nearest mean, within four standard deviations."""
        distance, which = torch.cdist(x, self.means.to(x)).min(1)
        return which.where(distance < 4 * self.std, -1)

    def mode_weights(self):
        return torch.full((self.modes,), 1 / self.modes)
