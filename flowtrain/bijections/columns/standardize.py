"""Columns of mean 0 and deviation 1."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections.bijection import constant_log_det, full_precision
from flowtrain.bijections.columns.column_bijection import ColumnBijection


class Standardize(ColumnBijection):
    """z = (x − mean)/std in each column, with the train split's mean and std; log-determinant −Σ log std, so that log p
    stays the density of x. Angles stay as they are.

    Raises:
        ValueError: ``shape`` is not that of a row.

    >>> Standardize((3,))(torch.ones(2, 3))[0].shape
    torch.Size([2, 3])
    """

    reversible = True
    mean: Tensor
    std: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("std", torch.ones(self.shape))

    def _fit(self, columns, rows) -> None:
        std, mean = torch.std_mean(rows.double(), 0, correction=0)
        moments = [_moments(column, *own) for column, *own in zip(columns, mean.tolist(), std.tolist())]
        self._set(mean=[mean for mean, _ in moments], std=[std for _, std in moments])

    def forward(self, x, context=None):
        with full_precision(x):
            return (x - self.mean) / self.std, constant_log_det(-self.std.log().sum(), x)

    def log_derivatives(self, x, context=None):
        return self(x)[0], -self.std.log().expand_as(x)

    def inverse(self, z, context=None):
        with full_precision(z):
            return z * self.std + self.mean, constant_log_det(self.std.log().sum(), z)


def _moments(column, mean: float, std: float) -> tuple[float, float]:
    """The moments by which a column is standardized: those of the whole split where its values are those of the file,
    else those of the rows that the layer receives."""
    if column.kind == "angle":
        return 0.0, 1.0
    if column.kind == "indicator" or column.low is not None or column.high is not None:
        return mean, std or 1.0
    return column.mean, column.std
