"""Neal's funnel."""

from __future__ import annotations

import math

import torch

from flowtrain.targets.target import Target


class Funnel(Target):
    """v ~ N(0, 3²), and D − 1 coordinates xᵢ ~ N(0, eᵛ) (Neal 2003, section 8). Normalized: log Z = 0.

    Raises:
        ValueError: ``dimensions`` below 2.

    >>> Funnel().log_prob(torch.zeros(1, 10))
    tensor([-10.2880])
    """

    name, log_z = "funnel", 0.0

    def __init__(self, dimensions: int = 10):
        if dimensions < 2:
            raise ValueError(f"dimensions={dimensions} must be at least 2")
        self.dimensions = dimensions
        self.names = ("v", *(f"x{i}" for i in range(1, dimensions)))

    def log_prob(self, x):
        v, others = x[:, 0], x[:, 1:]
        n = self.dimensions - 1
        of_v = -0.5 * (v / 3).square() - math.log(3)
        of_others = -0.5 * others.square().sum(1) * (-v).exp() - 0.5 * n * v
        return of_v + of_others - 0.5 * self.dimensions * math.log(2 * math.pi)

    def sample(self, n, generator=None):
        z = torch.randn(n, self.dimensions, generator=generator)
        v = 3 * z[:, :1]
        return torch.cat([v, z[:, 1:] * (v / 2).exp()], 1)
