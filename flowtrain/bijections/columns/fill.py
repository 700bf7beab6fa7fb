"""Missing values as noise of a known density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowtrain.bijections.bijection import full_precision
from flowtrain.bijections.columns.column_bijection import LARGEST, ColumnBijection
from flowtrain.runtime import global_batch

NONE, NORMAL, UNIFORM, EXPONENTIAL = range(4)  # the noise of a column


class FillMissing(ColumnBijection):
    """Values of noise where values are missing, and its log-density q subtracted: −Σ log q(noise).

    A row ends with an indicator for each incomplete column: at least 1 where the value is missing, below 1 where it is
    not, after dequantization. E[log p − log q] over the noise is a lower bound of the log-density of what was observed,
    by Jensen's inequality, as in dequantization. The noise of a column does not depend on the row:

    - a real number, an integer (after dequantization) or a time: normal, with the column's mean and deviation;
    - between two bounds, an angle or a category: uniform;
    - with one bound: that bound plus or minus exponential noise, with the column's mean.

    NaN where the indicator denies it stays NaN, and a value where the indicator says that it is missing becomes NaN.
    ``inverse`` puts NaN where the indicator says so; its log-determinant is Σ log q of the values that it drops.

    Raises:
        ValueError: ``shape`` is not that of a row.

    >>> FillMissing((3,))(torch.ones(2, 3))[1]
    tensor([-0., -0.])
    """

    exact = False
    indicator: Tensor
    noise: Tensor
    shift: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.register_buffer("indicator", torch.full(self.shape, -1))  # the number of a column's indicator; −1: none
        self.register_buffer("noise", torch.full(self.shape, NONE))
        self.register_buffer("shift", torch.zeros(self.shape))
        self.register_buffer("scale", torch.ones(self.shape))
        self.register_buffer("low", torch.full(self.shape, -LARGEST))  # of the noise, which rounding must not leave
        self.register_buffer("high", torch.full(self.shape, LARGEST))

    def _fit(self, columns, rows) -> None:
        indicators = {column.name: i for i, column in enumerate(columns) if column.kind == "indicator"}
        noise = [noise_of(column) if column.missing else (NONE, 0.0, 1.0) for column in columns]
        self._set(
            indicator=[indicators[column.name] if column.missing else -1 for column in columns],
            noise=[kind for kind, _, _ in noise],
            shift=[shift for _, shift, _ in noise],
            scale=[scale for _, _, scale in noise],
            low=[-LARGEST if column.low is None else column.low for column in columns],
            high=[LARGEST if column.high is None else column.high for column in columns],
        )

    def hide(self, x: Tensor) -> Tensor:
        """Rows x (…, D) with 0 in place of each value that is missing and whose indicator says so."""
        return x.masked_fill(x.isnan() & self._is_missing(x), 0)

    def forward(self, x, context=None):
        y, log_derivative = self.log_derivatives(x)
        return y, log_derivative.sum(1)

    def log_derivatives(self, x, context=None):
        with full_precision(x):
            missing = self._is_missing(x)
            noise = self._draw(x)
            y = torch.where(missing, torch.clamp(self.shift + self.scale * noise, self.low, self.high), x)
            y = torch.where(x.isnan() == missing, y, math.nan)
            return y, -self._log_density(noise, missing)

    def inverse(self, z, context=None):
        with full_precision(z):
            missing = self._is_missing(z)
            noise = (z - self.shift) / self.scale
            return torch.where(missing, math.nan, z), self._log_density(noise, missing).sum(1)

    def _is_missing(self, x: Tensor) -> Tensor:
        """Where the indicators say that a value is missing, (…, D)."""
        return (x.index_select(-1, self.indicator.clamp(min=0)) >= 1) & (self.indicator >= 0)

    def _draw(self, x: Tensor) -> Tensor:
        """Noise before ``shift`` and ``scale``, (B, D), from uniform numbers."""
        u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype).clamp(min=torch.finfo(x.dtype).eps / 4)
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return torch.where(self.noise == NORMAL, normal, torch.where(self.noise == UNIFORM, u, -torch.log1p(-u)))

    def _log_density(self, noise: Tensor, missing: Tensor) -> Tensor:
        """log q of each missing value, else 0: (B, D)."""
        normal = -0.5 * (noise.square() + math.log(2 * math.pi))
        log_q = torch.where(self.noise == NORMAL, normal, torch.where(self.noise == UNIFORM, 0.0, -noise))
        return torch.where(missing, log_q - self.scale.abs().log(), 0.0)


def noise_of(column) -> tuple[int, float, float]:
    """The noise that fills a column: its kind, shift and scale."""
    low, high = column.low, column.high
    if column.kind == "categorical":
        low, high = 0.0, float(len(column.categories))
    if low is None and high is None:
        return NORMAL, column.mean, column.std or 1.0
    if low is None or high is None:
        bound = low if high is None else high
        return EXPONENTIAL, bound, column.mean - bound or 1.0
    return UNIFORM, low, high - low
