"""From values on a grid to real numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections.bijection import zero_log_det
from flowtrain.bijections.columns.column_bijection import LARGEST, ColumnBijection
from flowtrain.runtime import global_batch, modes


class DequantizeColumns(ColumnBijection):
    """x + u in columns whose values are on a grid, u uniform between neighbours; x in all other columns.

    The grid of integers, categories and indicators has width 1, where the density of u is 1. So the log-determinant is
    0, and E[log p] is a lower bound of the log-probability of the integers (Theis et al. 2016, section 3.1). That of
    days, hours or minutes has their width in seconds; for these too the log-determinant is 0, and p is the density per
    second of the times with noise. ``inverse`` rounds down, and clamps categories and indicators to codes that exist. A
    missing value, NaN, stays one.

    Raises:
        ValueError: ``shape`` is not that of a row.

    >>> DequantizeColumns((3,))(torch.zeros(2, 3))[1]
    tensor([0., 0.])
    """

    exact = False
    width: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.register_buffer("width", torch.zeros(self.shape))  # of the noise; 0 for none
        self.register_buffer("least", torch.full(self.shape, -LARGEST))
        self.register_buffer("greatest", torch.full(self.shape, LARGEST))

    def _fit(self, columns, rows) -> None:
        codes = [2 if column.kind == "indicator" else len(column.categories) for column in columns]
        self._set(
            width=[column.width for column in columns],
            least=[0 if count else -LARGEST for count in codes],
            greatest=[count - 1 if count else LARGEST for count in codes],
        )

    def forward(self, x, context=None):
        x = x.to(self.width.dtype)
        u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype)
        # noise is drawn all the same: what is drawn next does not depend on the device, or on a compiler
        if modes.values_are_known() and x.is_cpu and not self.width.any():
            return x, zero_log_det(x)
        # the sum rounds up to the next value now and then
        y = torch.minimum(x + self.width * u, _below(x + self.width, x))
        return torch.where(self.width > 0, y, x), zero_log_det(x)

    def log_derivatives(self, x, context=None):
        z, _ = self(x)
        return z, torch.zeros_like(z)

    def inverse(self, z, context=None):
        width = torch.where(self.width > 0, self.width, 1).double()  # in float32 a quotient would round up now and then
        whole = ((z / width).floor() * width).to(z.dtype).maximum(self.least).minimum(self.greatest)
        return torch.where(self.width > 0, whole, z), zero_log_det(z)


def _below(y: Tensor, x: Tensor) -> Tensor:
    """The largest number below y > x (Rump, Zimmermann, Boldo and Melquiond 2009, eq. 2.5), or y where it is x: what
    torch.nextafter returns, which has no gradient and no counterpart in ONNX."""
    half = torch.finfo(y.dtype).eps / 2
    return torch.where(y > x, y - (half * (1 + 2 * half) * y.detach().abs() + torch.finfo(y.dtype).smallest_normal), y)
