"""The first layers of a table's flow. Buffers hold what the train split says of each column."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision, zero_log_det
from flowtrain.runtime import global_batch


class _ColumnBijection(Bijection):
    """A bijection with numbers for each column, which ``fit`` sets; until then it is the identity."""

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        if len(self.shape) != 1:
            raise ValueError(f"takes rows of a table, not shape {list(self.shape)}")

    def fit(self, columns, rows=None) -> None:
        """Set the numbers from a :class:`flowtrain.data.Columns`. ValueError if its number of columns is another."""
        if columns is None or len(columns.names) != self.shape[0]:
            raise ValueError(f"needs what is known of {self.shape[0]} columns, not {columns and len(columns.names)}")
        self._fit(columns)

    def _fit(self, columns) -> None:
        raise NotImplementedError

    def _set(self, **values) -> None:
        for name, value in values.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.tensor(value, dtype=torch.float64))


class DequantizeColumns(_ColumnBijection):
    """x + u in columns of integers and categories, u uniform in [0, 1); x in columns of real numbers.

    The density of u is 1. So the log-determinant is 0, and E[log p] is a lower bound of the log-probability of the
    integers (Theis et al. 2016, section 3.1). ``inverse`` rounds down, and clamps categories to codes that exist.

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
        self.register_buffer("width", torch.zeros(self.shape))  # of the noise: 1, or 0 for none
        self.register_buffer("least", torch.full(self.shape, -torch.inf))
        self.register_buffer("greatest", torch.full(self.shape, torch.inf))

    def _fit(self, columns) -> None:
        codes = [len(texts) for texts in columns.categories]
        self._set(
            width=[float(kind != "real") for kind in columns.kinds],
            least=[0 if count else -torch.inf for count in codes],
            greatest=[count - 1 if count else torch.inf for count in codes],
        )

    def forward(self, x, context=None):
        x = x.to(self.width.dtype)
        u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype)
        # x + u rounds up to x + 1 now and then
        y = torch.minimum(x + self.width * u, torch.nextafter(x + self.width, x))
        return y, zero_log_det(x)

    def inverse(self, z, context=None):
        whole = z.floor().maximum(self.least).minimum(self.greatest)
        return torch.where(self.width > 0, whole, z), zero_log_det(z)


class Standardize(_ColumnBijection):
    """z = (x − mean)/std in each column, with the train split's mean and std; log-determinant −Σ log std, so that log p
    stays the density of x.

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

    def _fit(self, columns) -> None:
        self._set(mean=columns.mean, std=columns.std)

    def forward(self, x, context=None):
        with full_precision(x):
            return (x - self.mean) / self.std, constant_log_det(-self.std.log().sum(), x)

    def inverse(self, z, context=None):
        with full_precision(z):
            return z * self.std + self.mean, constant_log_det(self.std.log().sum(), z)
