"""The first links of a table's chain: what its train split says of each column, kept in buffers."""

from __future__ import annotations

import torch

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision, zero_log_det
from flowtrain.runtime import globalbatch


class _Fitted(Bijection):
    """A link with a number or several for each column, set by ``fit``; until then it is the identity."""

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        if len(self.shape) != 1:
            raise ValueError(f"takes rows of a table, not shape {list(self.shape)}")

    def fit(self, columns) -> None:
        """Take what a :class:`flowtrain.data.Columns` says. ValueError where it has another number of columns."""
        if columns is None or len(columns.names) != self.shape[0]:
            raise ValueError(f"needs what is known of {self.shape[0]} columns, not {columns and len(columns.names)}")
        self._fit(columns)

    def _set(self, **values) -> None:
        for name, value in values.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.tensor(value, dtype=torch.float64))


class DequantizeColumns(_Fitted):
    """x + u in the columns of integers and categories, u uniform in [0, 1), and x in those of real numbers.

    The density of u is 1, so that the log-determinant is 0 and E[log p] bounds the log-probability of the integers
    from below (Theis et al. 2016, section 3.1). ``inverse`` rounds down, and categories to codes that exist.
    """

    exact = False

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.register_buffer("width", torch.zeros(self.shape))  # of a column's steps; 0: none
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
        u = globalbatch.uniform(x.shape, device=x.device, dtype=x.dtype)
        # x + u rounds up to x + 1 now and then
        y = torch.minimum(x + self.width * u, torch.nextafter(x + self.width, x))
        return y, zero_log_det(x)

    def inverse(self, z, context=None):
        whole = z.floor().maximum(self.least).minimum(self.greatest)
        return torch.where(self.width > 0, whole, z), zero_log_det(z)


class Standardize(_Fitted):
    """z = (x − mean)/std in each column, of the train split. Its log-determinant −Σ log std keeps log p that of x."""

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
