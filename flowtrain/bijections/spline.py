"""Monotone splines as univariate maps."""

from __future__ import annotations

import torch

from flowtrain.bijections.univariate import Univariate


class PiecewiseLinear(Univariate):
    """The cumulative distribution of a histogram of ``bins`` equal bins on [0, 1], the identity outside.

    θ holds the bins' logits (Müller et al. 2019, section 4.1). No bin is less likely than ``floor``, which bounds the
    inverse. With as many bins as data have levels it gives each level a probability of its own.
    """

    def __init__(self, shape, bins: int = 8, floor: float = 1e-5):
        super().__init__(shape)
        if bins < 2:
            raise ValueError(f"bins={bins} must be at least 2")
        if not 0 < floor < 1 / bins:
            raise ValueError(f"floor={floor} must lie between 0 and 1/bins")
        self.params, self.floor = bins, floor

    def forward(self, x, theta):
        weight = self._weight(theta)
        index = (x * self.params).floor().long().clamp(0, self.params - 1)
        before, own = self._at(weight, index)
        y = before + own * (x * self.params - index)
        inside = (x >= 0) & (x <= 1)
        return torch.where(inside, y, x), torch.where(inside, (own * self.params).log(), 0.0)

    def inverse(self, y, theta):
        weight = self._weight(theta)
        edges = weight.cumsum(-1)[..., :-1]
        index = (y[..., None] >= edges).sum(-1)
        before, own = self._at(weight, index)
        x = (index + ((y - before) / own).clamp(0, 1)) / self.params
        inside = (y >= 0) & (y <= 1)
        return torch.where(inside, x, y), torch.where(inside, -(own * self.params).log(), 0.0)

    def _weight(self, theta):
        """The probability of each bin."""
        return self.floor + (1 - self.params * self.floor) * torch.softmax(theta, -1)

    @staticmethod
    def _at(weight, index):
        """The probability below bin ``index`` and its own."""
        index = index[..., None]
        own = weight.gather(-1, index)[..., 0]
        return weight.cumsum(-1).gather(-1, index)[..., 0] - own, own
