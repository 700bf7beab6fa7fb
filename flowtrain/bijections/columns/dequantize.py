"""From whole numbers to real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections.bijection import zero_log_det
from flowtrain.bijections.columns.column_bijection import LARGEST, ColumnBijection
from flowtrain.runtime import global_batch


class DequantizeColumns(ColumnBijection):
    """x + u in columns of integers, categories and indicators, u uniform in [0, 1); x in all other columns.

    The density of u is 1. So the log-determinant is 0, and E[log p] is a lower bound of the log-probability of the
    integers (Theis et al. 2016, section 3.1). ``inverse`` rounds down, and clamps categories and indicators to codes
    that exist. A missing value, NaN, stays one.

    Raises:
        ValueError: ``shape`` is not that of a row.

    >>> DequantizeColumns((3,))(torch.zeros(2, 3))[1]
    tensor([0., 0.])
    """

    exact = False
    whole: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.register_buffer("whole", torch.zeros(self.shape, dtype=torch.bool))
        self.register_buffer("least", torch.full(self.shape, -LARGEST))
        self.register_buffer("greatest", torch.full(self.shape, LARGEST))

    def _fit(self, columns, rows) -> None:
        codes = [2 if column.kind == "indicator" else len(column.categories) for column in columns]
        self._set(
            whole=[column.is_dequantized for column in columns],
            least=[0 if count else -LARGEST for count in codes],
            greatest=[count - 1 if count else LARGEST for count in codes],
        )

    def forward(self, x, context=None):
        x = x.to(self.least.dtype)
        u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype)
        # x + u rounds up to x + 1 now and then
        y = torch.minimum(x + u, torch.nextafter(x + 1, x))
        return torch.where(self.whole, y, x), zero_log_det(x)

    def inverse(self, z, context=None):
        code = z.floor().maximum(self.least).minimum(self.greatest)
        return torch.where(self.whole, code, z), zero_log_det(z)
