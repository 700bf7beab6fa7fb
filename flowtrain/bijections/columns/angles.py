"""Angles: from their units to turns of a circle, and from the circle to the line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision
from flowtrain.bijections.columns.column_bijection import ColumnBijection


class Turns(ColumnBijection):
    """t = (x − low)/(high − low) for angles x: low and high are the same point, and so are 0 and 1.

    ``fit`` sets the ends, at first −π and π. ``inverse`` stays within them, for any number of turns.

    Raises:
        ValueError: ``shape`` is not that of a row; in ``fit``, an angle without two ends.

    >>> Turns((2,))(torch.tensor([[-torch.pi, 0.0]]))[0]
    tensor([[0.0000, 0.5000]])
    """

    low: Tensor
    high: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.register_buffer("low", torch.full(self.shape, -math.pi))
        self.register_buffer("high", torch.full(self.shape, math.pi))

    def _fit(self, columns, rows) -> None:
        for column in columns:
            if column.low is None or column.high is None:
                raise ValueError(f"needs both ends of the angle '{column.name}', such as 0 and 360")
        self._set(low=[column.low for column in columns], high=[column.high for column in columns])

    def forward(self, x, context=None):
        with full_precision(x):
            period = self.high - self.low
            return (x - self.low) / period, constant_log_det(-period.log().sum(), x)

    def log_derivatives(self, x, context=None):
        return self(x)[0], -(self.high - self.low).log().expand_as(x)

    def inverse(self, z, context=None):
        with full_precision(z):
            period = self.high - self.low
            t = z - z.floor()
            t = torch.where(t < 1 - 16 * torch.finfo(z.dtype).eps, t, 0.0)  # a rounding below a whole turn
            x = torch.clamp(self.low + period * t, self.low, self.high)
            return x, constant_log_det(period.log().sum(), z)


class CircleToLine(Bijection):
    """z = Φ⁻¹(u) for points u of a circle of length 1, with Φ the distribution function of N(0, 1): the uniform
    distribution of the circle becomes a standard normal one.

    The circle is cut at 0, where z is infinite: u is kept half a rounding away.

    >>> CircleToLine((2,))(torch.tensor([[0.5, 7.5]]))[0]
    tensor([[0., 0.]])
    """

    def forward(self, x, context=None):
        z, log_derivative = self.log_derivatives(x)
        return z, log_derivative.sum(1)

    def log_derivatives(self, x, context=None):
        with full_precision(x):
            margin = torch.finfo(x.dtype).eps / 2
            z = torch.special.ndtri((x - x.floor()).clamp(margin, 1 - margin))
            return z, -_log_normal(z)

    def inverse(self, z, context=None):
        with full_precision(z):
            return torch.special.ndtr(z), _log_normal(z).sum(1)


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi))
