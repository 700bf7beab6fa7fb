"""The base class of datasets of vectors: rows of a table, or points in the plane."""

import numpy as np
import torch

from flowtrain.data.dataset import Dataset
from flowtrain.data.spec import DataSpec
from flowtrain.data.split import ArraySplit
from flowtrain.data.tables.columns import Columns


class Vectors(Dataset):
    """Rows (D,), float32.

    Args:
        context: columns to be conditional on, see :class:`Table`; None for all other datasets.
        common: see :class:`Dataset`.
    """

    dims: int | None = None  # D; None: the file decides
    names: tuple[str, ...] | None = None  # of the columns; None: x0, x1, …
    default_test = 0.1

    def __init__(self, *, context=None, **common):
        super().__init__(**common)
        self._check_context(context)

    @property
    def spec(self) -> DataSpec:
        return DataSpec(self.name, (self.dims,))

    def _check_context(self, context) -> None:
        if context is not None:
            self._refuse("context", context, f"{self.name} has nothing to be conditional on")

    def _check_count(self, key: str, value, least: int = 1) -> int:
        """The value of a key that is a number of rows. Raises UsageError."""
        self._check_type(key, value, int, f"a whole number of at least {least}")
        if value is None or value < least:
            self._refuse(key, value, f"must be a whole number of at least {least}")
        return value

    def _make_split(self, name: str, rows: np.ndarray, how: str) -> ArraySplit:
        """A split of ``rows`` (N, D). The train split has ``columns`` with their moments."""
        columns = Columns.from_rows(rows, self.names) if name == "train" else None
        return ArraySplit(torch.from_numpy(rows), f"{self.name} {name}: {len(rows):,} rows {how}", columns=columns)
