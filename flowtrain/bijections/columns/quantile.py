"""Columns of any distribution to nearly normal ones, by their quantiles."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections.bijection import full_precision
from flowtrain.bijections.columns.column_bijection import ColumnBijection
from flowtrain.bijections.spline import Bin


class QuantileColumns(ColumnBijection):
    """A monotone spline in each column that takes the train rows' quantiles to those of N(0, 1); beyond them straight
    lines. Angles stay as they are.

    The knots lie evenly between the quantiles of −3 and 3, or as far out as the rows reach. Between them the spline is
    rational-quadratic (Gregory and Delbourgo 1982; Durkan et al. 2019, eq. 4), with the harmonic mean of the two
    neighbouring slopes at each knot (Fritsch and Butland 1984). Where a value repeats, quantiles coincide: the knots
    are kept a thousandth of their usual distance apart, which bounds the slope.

    Args:
        shape: (D,).
        bins: of the spline.
        context_shape: not used.

    Raises:
        ValueError: ``shape`` is not that of a row, or ``bins`` below 2.

    >>> QuantileColumns((3,))(torch.ones(2, 3))[0].shape
    torch.Size([2, 3])
    """

    x: Tensor
    z: Tensor
    slope: Tensor
    fitted: Tensor

    def __init__(self, shape, bins: int = 32, context_shape=None):
        super().__init__(shape, context_shape)
        if bins < 2:
            raise ValueError(f"bins={bins} must be at least 2")
        knots = torch.linspace(-3, 3, bins + 1).repeat(self.shape[0], 1)
        self.register_buffer("x", knots)  # of the knots, (D, bins + 1)
        self.register_buffer("z", knots.clone())
        self.register_buffer("slope", torch.ones_like(knots))  # dz/dx at the knots
        self.register_buffer("fitted", torch.zeros(self.shape, dtype=torch.bool))

    def _fit(self, columns, rows) -> None:
        reach = torch.special.ndtri(torch.tensor(1 - 0.5 / (len(rows) + 1), dtype=torch.float64)).clamp(max=3)
        z = reach * torch.linspace(-1, 1, self.z.shape[1], dtype=torch.float64)
        shares = torch.special.ndtr(z)
        for i, column in enumerate(columns):
            if column.kind != "angle":
                self.fit_column(i, torch.quantile(rows[:, i].double().cpu(), shares), z)

    def fit_column(self, i: int, x: Tensor, z: Tensor) -> None:
        """Let the spline of column i take the quantiles ``x`` to ``z``, both (bins + 1,) float64 and rising."""
        x = _separate(x)
        for buffer, numbers in ((self.x, x), (self.z, z), (self.slope, _slopes(x, z))):
            buffer[i].copy_(numbers)
        self.fitted[i] = True

    def forward(self, x, context=None):
        z, log_derivative = self.log_derivatives(x)
        return z, log_derivative.sum(1)

    def log_derivatives(self, x, context=None):
        with full_precision(x):
            inside, piece = self._find(x, self.x)
            rise, log_slope = piece.at((inside - piece.left) / piece.width)
            z = piece.bottom + piece.height * rise + (x - inside) * log_slope.exp()
            return torch.where(self.fitted, z, x), torch.where(self.fitted, log_slope, 0.0)

    def inverse(self, z, context=None):
        with full_precision(z):
            inside, piece = self._find(z, self.z)
            t = piece.position((inside - piece.bottom) / piece.height)
            log_slope = piece.at(t)[1]
            x = piece.left + piece.width * t + (z - inside) * (-log_slope).exp()
            return torch.where(self.fitted, x, z), -torch.where(self.fitted, log_slope, 0.0).sum(1)

    def _find(self, value: Tensor, knots: Tensor) -> tuple[Tensor, Bin]:
        """``value`` (B, D), not beyond the ``knots`` (D, bins + 1) of its column, and the bins that hold it. At an end
        the spline has the slope of the straight line beyond."""
        inside = value.clamp(knots[:, 0], knots[:, -1])
        with torch.no_grad():
            index = torch.searchsorted(knots, inside.T.contiguous(), right=True)  # (D, B)
            start = (index - 1).clamp(0, knots.shape[1] - 2)

        def at(numbers: Tensor, place: Tensor) -> Tensor:
            return numbers.gather(1, place).T

        left, bottom = at(self.x, start), at(self.z, start)
        width, height = at(self.x, start + 1) - left, at(self.z, start + 1) - bottom
        return inside, Bin(left, bottom, width, height, at(self.slope, start), at(self.slope, start + 1))


def _separate(x: Tensor) -> Tensor:
    """Quantiles that are at least a thousandth of their usual distance apart, and so far that float32 tells them apart.
    Equal ones move to both sides alike."""
    gaps = x.diff()
    usual = gaps[gaps > 0].median().item() if (gaps > 0).any() else 1.0
    offset = (8 * torch.finfo(torch.float32).eps * x.abs()).clamp(min=usual / 1000).cumsum(0)
    upwards = (x - offset).cummax(0).values + offset
    downwards = (x - offset).flip(0).cummin(0).values.flip(0) + offset
    return (upwards + downwards) / 2


def _slopes(x: Tensor, z: Tensor) -> Tensor:
    """dz/dx at each knot: the harmonic mean of the slopes on both sides, at the ends the slope of the last bin."""
    slope = z.diff() / x.diff()
    inner = 2 / (1 / slope[1:] + 1 / slope[:-1])
    return torch.cat([slope[:1], inner, slope[-1:]])
