"""Double wells: one in the plane, and many side by side."""

from __future__ import annotations

import math

import torch

from flowtrain.targets.grid import LineGrid
from flowtrain.targets.target import Target

MOST_COUNTED = 20  # wells whose modes are counted, of which there are 2^20


class ManyWell(Target):
    """D/2 independent double wells, log p = Σ −x⁴ + 6x² + x/2 − y²/2 over pairs (x, y), with 2^(D/2) modes (Noé et al.
    2019; Midgley et al. 2023, section 4.2). log Z is known by quadrature on the line; samples are exact up to its grid.

    Raises:
        ValueError: ``dimensions`` odd or below 2.

    >>> round(ManyWell(32).log_z, 4), ManyWell(32).modes
    (164.6957, 65536)
    """

    name = "many_well"

    def __init__(self, dimensions: int = 32):
        if dimensions < 2 or dimensions % 2:
            raise ValueError(f"dimensions={dimensions} must be even: each well has two")
        self.dimensions, self.wells = dimensions, dimensions // 2
        self.modes = 2**self.wells if self.wells <= MOST_COUNTED else None
        self.scale = 1.5
        self.grid = LineGrid(lambda x: -(x**4) + 6 * x**2 + x / 2, -6, 6)
        self.log_z = self.wells * (self.grid.log_z + 0.5 * math.log(2 * math.pi))
        self.names = tuple(f"{axis}{well}" for well in range(self.wells) for axis in "xy")

    def log_prob(self, x):
        x, y = x[:, ::2], x[:, 1::2]
        squares = x.square()
        return (squares * (6 - squares) + 0.5 * x - 0.5 * y.square()).sum(1)

    def sample(self, n, generator=None):
        x = self.grid.sample(n * self.wells, generator).float().reshape(n, self.wells)
        return torch.stack([x, torch.randn(n, self.wells, generator=generator)], 2).flatten(1)

    def mode_of(self, x):
        """The wells' sides as the bits of a number: 1 right of 0."""
        right = x[:, ::2] > 0
        return (right * 2 ** torch.arange(self.wells, device=x.device)).sum(1)

    def mode_weights(self):
        left = self.grid.share_below(0.0)
        bits = torch.arange(self.modes)[:, None] >> torch.arange(self.wells) & 1
        return torch.where(bits == 1, 1 - left, left).prod(1)


class DoubleWell(ManyWell):
    """One double well in the plane: :class:`ManyWell` in two dimensions.

    >>> DoubleWell().mode_weights()
    tensor([0.1557, 0.8443])
    """

    name = "double_well"

    def __init__(self):
        super().__init__(2)
        self.names = ("x", "y")
