"""A user's own table: its columns chosen, their kinds found, its rows split."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from flowtrain.data.spec import ColumnContext, DataSpec
from flowtrain.data.split import ArraySplit, split_indices
from flowtrain.data.tables.block import BLOCK
from flowtrain.data.tables.columns import Columns, encode_values
from flowtrain.data.tables.inference import context_width, infer_columns
from flowtrain.data.tables.table_file import TableFile, refuse_changes
from flowtrain.data.vectors import Vectors
from flowtrain.errors import FlowtrainError, UsageError


class Table(Vectors):
    """A .csv, .npy or .parquet of numbers and text, with the columns to model.

    Rows stay in the units of the file; use it with ``preprocess=standardize``. ``columns`` of a split describe each
    column: integer if every value is a whole number, categorical if it is text or true and false, otherwise real, as
    found in all rows of the file. A missing value is refused with its column and row. Rows are in memory once.

    Args:
        columns: names of the columns to model, or their numbers for an array; None: all but those of ``context``.
        context: names of the columns to be conditional on, or None. Numbers are standardized by the moments of the
            train split; categories become one-hot.
        val_size, test_size: number or fraction of the rows.
    """

    native_name = "table"

    def __init__(self, *, columns: list | None = None, **keys):
        super().__init__(**keys)
        self._check_list("columns", columns)
        self.columns = columns
        self._known: Columns | None = None
        self._parts: dict[str, tuple[np.ndarray, torch.Tensor | None]] = {}

    @property
    def spec(self) -> DataSpec:
        return self._header if self._known is None else self._spec_of(self._known)

    @cached_property
    def _header(self) -> DataSpec:
        """The description by the header of the file. Text in the context needs all rows, to count its categories."""
        file = self._file()
        names, context = file.choose(self.columns, self.context)
        context = ColumnContext(tuple(context), (context_width(file, context),)) if context else None
        return DataSpec(self.name, (len(names),), context=context)

    def _spec_of(self, columns: Columns) -> DataSpec:
        context = ColumnContext(tuple(columns.context_names), tuple(columns.context_shape)) if columns.context else None
        return DataSpec(self.name, (len(columns.names),), context=context)

    def _file(self) -> TableFile:
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs dataset.path=FILE (csv, npy or parquet)")
        return TableFile(self.path)

    def use_columns(self, columns: Columns | None) -> None:
        """Encode rows by the columns of a checkpoint, since this file may have other categories and moments. An unknown
        category is refused."""
        self._known = columns

    def _check_context(self, context) -> None:
        self._check_list("context", context)
        self.context = context

    def _check_list(self, key, value) -> None:
        if value is not None and not isinstance(value, list | tuple):
            self._refuse(key, value, "must be a list of columns, such as [age,income]")

    def _open(self, name: str) -> ArraySplit:
        if not self._parts:
            self._read()
        rows, context = self._parts[name]
        return ArraySplit(torch.from_numpy(rows), self._description(name, len(rows)), context, self._known)

    def _description(self, name: str, rows: int) -> str:
        kinds = self._known.kinds
        counts = [f"{kinds.count(kind)} {kind}" for kind in ("real", "integer", "categorical") if kind in kinds]
        given = f", conditional on {', '.join(self._known.context_names)}" if self._known.context else ""
        return (
            f"{self.name} {name}: {rows:,} rows of {self.path}, {' + '.join(counts)} columns{given},"
            f" cut with seed {self.split_seed}"
        )

    def _read(self) -> None:
        """Read the file twice: to find the kinds of its columns, then their values."""
        spec, file = self.spec, self._file()
        with refuse_changes(self.path):
            count, columns = self._survey(file)
            if self._spec_of(columns) != spec:
                raise FlowtrainError(f"{self.path} has changed since its header was read")
            both = _read_values(file, columns, count)
        parts = split_indices(count, self.val_size, self.test_size, self.split_seed)
        parts = {part: np.sort(chosen) for part, chosen in parts.items()}
        rows, context = (_split_rows(values, parts) for values in both)
        self._known = self._known or columns.with_moments(rows["train"], context["train"])
        self._parts = {
            part: (rows[part], self._known.standardize_context(context[part]) if columns.context else None)
            for part in parts
        }

    def _survey(self, file: TableFile) -> tuple[int, Columns]:
        """The number of rows, and the columns; their moments are still missing unless a checkpoint has them."""
        known = self._known
        if known is None:
            names, context = file.choose(self.columns, self.context)
        else:
            names, context = (
                file.find_columns("columns", known.names),
                file.find_columns("context", known.context_names),
            )
        count, found = infer_columns(file, [*names, *context])
        modelled, given = found[: len(names)], found[len(names) :]
        given = [column if column.categories else replace(column, kind="real") for column in given]
        return count, known or Columns(tuple(modelled), tuple(given))


def _read_values(file: TableFile, columns: Columns, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The modelled columns and those of the context, float32 (N, columns), as :func:`encode_values` returns them."""
    kinds = (columns.modelled, columns.context)
    out = tuple(np.empty((count, len(kind)), dtype=np.float32) for kind in kinds)
    start = 0
    for block in file.blocks([*columns.names, *columns.context_names]):
        size = len(next(iter(block.values())))
        for values, kind in zip(out, kinds, strict=True):
            if kind:
                values[start : start + size] = encode_values(kind, block, start + 1)
        start += size
    return out


def _split_rows(rows: np.ndarray, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Split ``rows`` by the sorted row numbers of each split. This overwrites ``rows``: those of train move to the
    front, so that a table of gigabytes is not in memory twice."""
    out = {name: rows[index] for name, index in parts.items() if name != "train"}
    train = parts["train"]
    for start in range(0, len(train), BLOCK):
        some = train[start : start + BLOCK]
        rows[start : start + len(some)] = rows[some]  # sorted numbers: no row is overwritten before it is read
    return out | {"train": rows[: len(train)]}
