"""From an interval or a half-line to the real line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowtrain.bijections.bijection import full_precision
from flowtrain.bijections.columns.column_bijection import LARGEST, ColumnBijection
from flowtrain.bijections.interval import from_line, to_line


class BoundColumns(ColumnBijection):
    """Real columns with bounds to the real line; x in all other columns.

    Between two bounds z is a line, and the logarithm of the distance to the bound in the outer tenths; see
    :func:`flowtrain.bijections.interval.to_line`. With one bound z = log(t) with t = (x − low)/(mean − low), or
    z = −log(t) with t = (high − x)/(high − mean). A value on a bound would map to ±∞: it is kept half a rounding of the
    width, or of t, inside. A value outside becomes NaN, since it has no density. ``inverse`` stays within the bounds.

    Raises:
        ValueError: ``shape`` is not that of a row; in ``fit``, rows beyond the bounds of a column, which is named.

    >>> BoundColumns((3,))(torch.ones(2, 3))[0].shape
    torch.Size([2, 3])
    """

    bounded: Tensor
    boxed: Tensor
    sign: Tensor
    anchor: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.register_buffer("bounded", torch.zeros(self.shape, dtype=torch.bool))
        self.register_buffer("boxed", torch.zeros(self.shape, dtype=torch.bool))
        self.register_buffer("sign", torch.ones(self.shape))  # −1 where t grows downwards, from an upper bound
        self.register_buffer("anchor", torch.zeros(self.shape))  # the bound at which t = 0
        self.register_buffer("scale", torch.ones(self.shape))
        self.register_buffer("low", torch.full(self.shape, -LARGEST))  # rounded as data are
        self.register_buffer("high", torch.full(self.shape, LARGEST))
        self.register_buffer("least", torch.full(self.shape, -LARGEST))  # of samples: rounded inwards
        self.register_buffer("greatest", torch.full(self.shape, LARGEST))

    def _fit(self, columns, rows) -> None:
        bounds = [(column.low, column.high) if column.kind == "real" else (None, None) for column in columns]
        maps = [_unit_map(low, high, column.mean) for (low, high), column in zip(bounds, columns)]
        low, high = (
            torch.tensor([none if end is None else end for end in ends], dtype=torch.float64, device=self.low.device)
            for ends, none in zip(zip(*bounds), (-LARGEST, LARGEST))
        )
        self._set(
            bounded=[ends != (None, None) for ends in bounds],
            boxed=[None not in ends for ends in bounds],
            sign=[sign for sign, _, _ in maps],
            anchor=[anchor for _, anchor, _ in maps],
            scale=[scale for _, _, scale in maps],
            low=low,
            high=high,
        )
        self._set(
            # float32 may have rounded outwards
            least=torch.where(self.low.double() < low, torch.nextafter(self.low, self.high), self.low),
            greatest=torch.where(self.high.double() > high, torch.nextafter(self.high, self.low), self.high),
        )
        beyond = ((rows < self.low) | (rows > self.high)).any(0) & self.bounded
        for i in beyond.nonzero().flatten().tolist():
            least, greatest = rows[:, i].aminmax()
            raise ValueError(
                f"column '{columns[i].name}' has values from {least:g} to {greatest:g}, beyond its bounds,"
                f" {' and '.join(f'{end:g}' for end in bounds[i] if end is not None)}"
            )

    def forward(self, x, context=None):
        z, log_derivative = self.log_derivatives(x)
        return z, log_derivative.sum(1)

    def log_derivatives(self, x, context=None):
        with full_precision(x):
            inside = (x >= self.low) & (x <= self.high)
            anchor, sign = self._nearer(x - self.anchor > self.scale / 2)
            t = torch.where(self.bounded, sign * (x - anchor) / self.scale, 0.5)
            y, log_slope = to_line(t.clamp(min=torch.finfo(x.dtype).eps / 2), self.boxed)
            z, log_derivative = torch.where(inside, sign * y, math.nan), log_slope - self.scale.log()
            return torch.where(self.bounded, z, x), torch.where(self.bounded, log_derivative, 0.0)

    def inverse(self, z, context=None):
        with full_precision(z):
            anchor, sign = self._nearer(z > 0)
            t, log_slope = from_line(torch.where(self.bounded, sign * z, 0.0), self.boxed)
            x = torch.clamp(anchor + sign * self.scale * t, self.least, self.greatest)
            log_derivative = log_slope + self.scale.log()
            return torch.where(self.bounded, x, z), torch.where(self.bounded, log_derivative, 0.0).sum(1)

    def _nearer(self, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The bound from which distances are taken, and their sign: in the ``upper`` half of a box, its upper one."""
        upper = upper & self.boxed
        return torch.where(upper, self.anchor + self.scale, self.anchor), torch.where(upper, -1.0, self.sign)


def _unit_map(low: float | None, high: float | None, mean: float) -> tuple[float, float, float]:
    """Sign, anchor and scale of t = sign·(x − anchor)/scale."""
    if low is not None and high is not None:
        return 1.0, low, high - low
    if low is not None:
        return 1.0, low, mean - low or 1.0
    if high is not None:
        return -1.0, high, high - mean or 1.0
    return 1.0, 0.0, 1.0
