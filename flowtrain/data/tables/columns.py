"""Columns of a table: from the values of a file to the numbers that a flow receives, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.tables.block import BLOCK
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.table_file import missing_value_error
from flowtrain.errors import FlowtrainError, UsageError


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a flow models, and those that it is conditional on.

    The flow receives a modelled number in the units of the file, minus the ``offset`` of its column, and a modelled
    text as its index among the categories. Numbers of a context are standardized by ``mean`` and ``std``; texts of a
    context become one-hot vectors.

    Attributes:
        modelled: ``mean`` and ``std`` are those of the train split, minus the offset and after dequantization, which
            adds ½ to the mean and 1/12 to the variance of an integer or categorical column.
        context: ``mean`` and ``std`` are those of the train split, minus the offset.
    """

    modelled: tuple[Column, ...]
    context: tuple[Column, ...] = ()

    @classmethod
    def from_rows(cls, rows: np.ndarray, names: Sequence[str] | None = None) -> Columns:
        """Real columns for rows (N, D) that do not come from a file. Default names are x0, x1, …."""
        names = names or [f"x{i}" for i in range(rows.shape[1])]
        return cls(tuple(Column(name, "real") for name in names)).with_moments(rows)

    def with_moments(self, rows: np.ndarray, context: np.ndarray | None = None) -> Columns:
        """These columns with the means and standard deviations of a train split.

        Args:
            rows: the modelled columns, (N, D).
            context: the context columns before standardization, (N, columns), as :func:`encode_values` returns them.

        Raises:
            UsageError: a column is constant; it is named.
        """
        context = np.empty((len(rows), 0)) if context is None else context
        return Columns(
            tuple(_with_moments(self.modelled, rows, dequantized=True)),
            tuple(_with_moments(self.context, context, dequantized=False)),
        )

    @property
    def encoded(self) -> tuple[Column, ...]:
        """What each number of a flow's row is: a modelled column, or at the end an indicator of an incomplete one."""
        incomplete = [column for column in self.modelled if column.missing]
        return self.modelled + tuple(Column(column.name, "indicator") for column in incomplete)

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.modelled]

    @property
    def kinds(self) -> list[str]:
        """The kind of each modelled column: "real", "integer" or "categorical"."""
        return [column.kind for column in self.modelled]

    @property
    def categories(self) -> list[tuple[str, ...]]:
        """The categories of each modelled column, () if it is not categorical."""
        return [column.categories for column in self.modelled]

    @property
    def mean(self) -> list[float]:
        return [column.mean for column in self.modelled]

    @property
    def std(self) -> list[float]:
        return [column.std for column in self.modelled]

    @property
    def all_integer(self) -> bool:
        """Whether no modelled column is real, so that bits per dimension are defined."""
        return all(kind != "real" for kind in self.kinds)

    @property
    def context_names(self) -> list[str]:
        return [column.name for column in self.context]

    @property
    def context_shape(self) -> list[int] | None:
        return [sum(len(column.categories) or 1 for column in self.context)] if self.context else None

    def encode(self, frame: Mapping, first_row: int = 1) -> tuple[Tensor, Tensor | None]:
        """Encode new rows for a flow: x, float32 (N, D), and their context, float32 (N, C), or None without one.

        Args:
            frame: a mapping from names to N values each, such as a pandas table. Other columns are ignored.
            first_row: the number of the first row in error messages.

        Raises:
            UsageError: a column or value is missing, a value is text instead of a number, a fraction instead of a
                whole number, or an unknown category. The message names the column and the row.
        """
        x = torch.from_numpy(encode_values(self.modelled, frame, first_row))
        return x, self.encode_context(frame, first_row) if self.context else None

    def encode_context(self, frame: Mapping, first_row: int = 1) -> Tensor:
        """Encode only the context, float32 (N, C); ``frame`` needs no other columns. Errors as in :meth:`encode`."""
        return self.standardize_context(encode_values(self.context, frame, first_row))

    def standardize_context(self, context: np.ndarray) -> Tensor:
        """Context values, float32 (N, columns) as :func:`encode_values` returns them, standardized and one-hot:
        float32 (N, C)."""
        parts = []
        for column, values in zip(self.context, torch.from_numpy(context).unbind(1), strict=True):
            if column.categories:
                parts.append(torch.nn.functional.one_hot(values.long(), len(column.categories)).float())
            else:
                parts.append((values[:, None] - column.mean) / column.std)
        return torch.cat(parts, 1)

    def decode(self, x: Tensor) -> dict[str, np.ndarray]:
        """Rows (N, D) as the file would hold them: a mapping from names to N values, float64, int64 or text."""
        values = x.detach().cpu().double().numpy()
        return {column.name: _decode_column(column, values[:, i]) for i, column in enumerate(self.modelled)}

    def to_record(self) -> dict:
        """These columns as plain data, for a checkpoint."""
        return {
            key: [asdict(column) | {"categories": list(column.categories)} for column in columns]
            for key, columns in (("modelled", self.modelled), ("context", self.context))
        }

    @classmethod
    def from_record(cls, record: dict) -> Columns:
        """The inverse of :meth:`to_record`. Raises FlowtrainError for a damaged record."""
        try:
            modelled, context = (
                tuple(Column(**item | {"categories": tuple(item["categories"])}) for item in record[key])
                for key in ("modelled", "context")
            )
            return cls(modelled, context)
        except (KeyError, TypeError) as error:
            raise FlowtrainError(f"the record of a table's columns is damaged: {error}") from error


def encode_values(columns: Sequence[Column], frame: Mapping, first_row: int) -> np.ndarray:
    """Columns of ``frame`` as float32 (N, columns): numbers minus their offset, texts as indices of categories.

    Raises UsageError as :meth:`Columns.encode` does.
    """
    for column in columns:
        if column.name not in frame:
            raise UsageError(f"column '{column.name}' is missing")
    parts = [_encode_column(column, frame[column.name], first_row) for column in columns]
    return np.stack(parts, 1).astype(np.float32)


def _encode_column(column: Column, values: Iterable, first_row: int) -> np.ndarray:
    if column.kind == "categorical":
        codes = {text: code for code, text in enumerate(column.categories)}
        found = np.array([codes.get(value, -1) for value in values])
        if len(found) and found.min() < 0:  # booleans and numbers are not text yet
            found = np.array([codes.get(_text(value), -1) for value in values])
        if len(found) and found.min() < 0:
            row = int(found.argmin())
            value = _text(list(values)[row])
            if value is None:
                raise missing_value_error(column.name, first_row + row)
            known = ", ".join(column.categories[:12]) + (", …" if len(column.categories) > 12 else "")
            raise UsageError(f"column '{column.name}', row {first_row + row}: '{value}' is not one of {known}")
        return found
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        row, value = next((row, value) for row, value in enumerate(values) if not _is_number(value))
        if _text(value) is None:
            raise missing_value_error(column.name, first_row + row) from None
        raise UsageError(f"column '{column.name}', row {first_row + row}: '{value}' is not a number") from None
    with np.errstate(over="ignore", invalid="ignore"):  # too large a number, or a signalling NaN, is refused below
        encoded = (numbers - column.offset).astype(np.float32)
    if not np.isfinite(encoded).all():
        raise missing_value_error(column.name, first_row + int(np.isfinite(encoded).argmin()))
    if column.kind == "integer" and (numbers != np.floor(numbers)).any():
        row = int((numbers != np.floor(numbers)).argmax())
        raise UsageError(f"column '{column.name}', row {first_row + row}: {numbers[row]:g} is not a whole number")
    return encoded


def _text(value) -> str | None:
    """A category as the text that the file holds, None if it is missing."""
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    if value is None or value == "":
        return None
    if isinstance(value, float | np.floating):  # a column of 1, 2, … was read as numbers
        return None if np.isnan(value) else f"{value:.15g}"
    return str(value)


def _is_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _decode_column(column: Column, values: np.ndarray) -> np.ndarray:
    if column.kind == "real":
        return values + column.offset
    codes = np.rint(values).astype(np.int64)
    if column.kind == "integer":
        return codes + int(column.offset)
    return np.array(column.categories, dtype=object)[codes.clip(0, len(column.categories) - 1)]


def _with_moments(columns: Sequence[Column], rows: np.ndarray, dequantized: bool):
    if not columns:
        return
    mean, std = moments(rows)
    constant = rows.min(0) == rows.max(0)
    for i, column in enumerate(columns):
        if constant[i] or std[i] == 0:
            raise UsageError(
                f"column '{column.name}' is constant in the {len(rows):,} rows of the train split, so it has no"
                " density; leave it out with dataset.columns=[…]"
            )
        shift, var = (0.5, 1 / 12) if dequantized and column.kind != "real" else (0.0, 0.0)
        yield replace(column, mean=float(mean[i] + shift), std=float(np.sqrt(std[i] ** 2 + var)))


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of each column of rows (N, D), in float64, without a copy of all rows."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]
    mean = sum(rows[block].sum(0, dtype=np.float64) for block in blocks) / len(rows)
    squares = sum(np.square(rows[block] - mean).sum(0) for block in blocks)
    return mean, np.sqrt(squares / len(rows))
