"""What the columns of a table are: from a file's values to the numbers that a flow is given, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.table_file import BLOCK, Column, missing_value_error
from flowtrain.errors import FlowtrainError, UsageError


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a flow models, and those that it is conditional on.

    A modelled value is given to the flow less its column's ``offset``, in the file's units; text as its number among
    the categories. A context column is standardized, by ``mean`` and ``std``; text is one-hot.

    Attributes:
        modelled: their ``mean`` and ``std`` are those of the train split, less the offset and after dequantization:
            half a unit and a variance of 1/12 are added where a column is not real.
        context: theirs are of the train split, less the offset.
    """

    modelled: tuple[Column, ...]
    context: tuple[Column, ...] = ()

    @classmethod
    def from_rows(cls, rows: np.ndarray, names: Sequence[str] | None = None) -> Columns:
        """Of real rows (N, D) that come from no file, named x0, x1, … if not otherwise."""
        names = names or [f"x{i}" for i in range(rows.shape[1])]
        return cls(tuple(Column(name, "real") for name in names)).with_moments(rows)

    def with_moments(self, rows: np.ndarray, context: np.ndarray | None = None) -> Columns:
        """With the means and deviations of the train split: its rows and, one column each, its context before it is
        standardized. UsageError, by name, where a column is constant."""
        context = np.empty((len(rows), 0)) if context is None else context
        return Columns(
            tuple(_with_moments(self.modelled, rows, dequantized=True)),
            tuple(_with_moments(self.context, context, dequantized=False)),
        )

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.modelled]

    @property
    def kinds(self) -> list[str]:
        """Of each modelled column "real", "integer" or "categorical"."""
        return [column.kind for column in self.modelled]

    @property
    def categories(self) -> list[tuple[str, ...]]:
        """Of each modelled column; none where it is not categorical."""
        return [column.categories for column in self.modelled]

    @property
    def mean(self) -> list[float]:
        return [column.mean for column in self.modelled]

    @property
    def std(self) -> list[float]:
        return [column.std for column in self.modelled]

    @property
    def all_integer(self) -> bool:
        """Whether every modelled value is one of integers or categories, so that bits per dimension mean something."""
        return all(kind != "real" for kind in self.kinds)

    @property
    def context_names(self) -> list[str]:
        return [column.name for column in self.context]

    @property
    def context_shape(self) -> list[int] | None:
        return [sum(len(column.categories) or 1 for column in self.context)] if self.context else None

    def encode(self, frame: Mapping, first_row: int = 1) -> tuple[Tensor, Tensor | None]:
        """What a flow is given for new rows: x, float32 (N, D), and their context, float32 (N, C) or None.

        Args:
            frame: name -> N values; a pandas table will do. Columns that are not asked for are left alone.
            first_row: what messages call the first of them.

        Raises UsageError, naming column and row, for a missing column or value, text where numbers are due, a fraction
        where whole numbers are due, and an unknown category.
        """
        x = torch.from_numpy(encode_values(self.modelled, frame, first_row))
        return x, self.encode_context(frame, first_row) if self.context else None

    def encode_context(self, frame: Mapping, first_row: int = 1) -> Tensor:
        """The context alone, float32 (N, C), of a ``frame`` that needs no other columns."""
        return self.standardize_context(encode_values(self.context, frame, first_row))

    def standardize_context(self, context: np.ndarray) -> Tensor:
        """The context, float32 (N, C), of its raw columns, float32 (N, columns): numbers less offsets, and codes."""
        parts = []
        for column, values in zip(self.context, torch.from_numpy(context).unbind(1), strict=True):
            if column.categories:
                parts.append(torch.nn.functional.one_hot(values.long(), len(column.categories)).float())
            else:
                parts.append((values[:, None] - column.mean) / column.std)
        return torch.cat(parts, 1)

    def decode(self, x: Tensor) -> dict[str, np.ndarray]:
        """Rows (N, D) in the file's own terms: name -> float64 values, int64 ones, or text."""
        values = x.detach().cpu().double().numpy()
        return {column.name: _decode_column(column, values[:, i]) for i, column in enumerate(self.modelled)}

    def to_record(self) -> dict:
        """As plain data, for a checkpoint."""
        return {
            key: [asdict(column) | {"categories": list(column.categories)} for column in columns]
            for key, columns in (("modelled", self.modelled), ("context", self.context))
        }

    @classmethod
    def from_record(cls, record: dict) -> Columns:
        """FlowtrainError for what :meth:`to_record` has not made."""
        try:
            modelled, context = (
                tuple(Column(**item | {"categories": tuple(item["categories"])}) for item in record[key])
                for key in ("modelled", "context")
            )
            return cls(modelled, context)
        except (KeyError, TypeError) as error:
            raise FlowtrainError(f"the record of a table's columns is damaged: {error}") from error


def encode_values(columns: Sequence[Column], frame: Mapping, first_row: int) -> np.ndarray:
    """Columns of ``frame`` as float32 (N, columns): numbers less their offset, and codes."""
    for column in columns:
        if column.name not in frame:
            raise UsageError(f"column '{column.name}' is missing")
    parts = [_encode_column(column, frame[column.name], first_row) for column in columns]
    return np.stack(parts, 1).astype(np.float32)


def _encode_column(column: Column, values: Iterable, first_row: int) -> np.ndarray:
    if column.kind == "categorical":
        codes = {text: code for code, text in enumerate(column.categories)}
        found = np.array([codes.get(value, -1) for value in values])
        if len(found) and found.min() < 0:  # true and false, or a number, are no text yet
            found = np.array([codes.get(_text(value), -1) for value in values])
        if len(found) and found.min() < 0:
            row = int(found.argmin())
            value = _text(list(values)[row])
            if value is None:
                raise missing_value_error(column.name, first_row + row)
            known = ", ".join(column.categories[:12]) + (", …" if len(column.categories) > 12 else "")
            raise UsageError(f"column '{column.name}', row {first_row + row}: '{value}' is none of {known}")
        return found
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        row, value = next((row, value) for row, value in enumerate(values) if not _is_number(value))
        if _text(value) is None:
            raise missing_value_error(column.name, first_row + row) from None
        raise UsageError(f"column '{column.name}', row {first_row + row}: '{value}' is no number") from None
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large, or a signalling NaN, is refused below
        held = (numbers - column.offset).astype(np.float32)
    if not np.isfinite(held).all():
        raise missing_value_error(column.name, first_row + int(np.isfinite(held).argmin()))
    if column.kind == "integer" and (numbers != np.floor(numbers)).any():
        row = int((numbers != np.floor(numbers)).argmax())
        raise UsageError(f"column '{column.name}', row {first_row + row}: {numbers[row]:g} is no whole number")
    return held


def _text(value) -> str | None:
    """A category as the file's text, None where it is missing."""
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    if value is None or value == "":
        return None
    if isinstance(value, float | np.floating):  # a file's column of 1, 2, … was read as numbers
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
                f"column '{column.name}' is constant in the {len(rows):,} rows of the train split, where no density can"
                " be learnt of it; leave it out with dataset.columns=[…]"
            )
        shift, var = (0.5, 1 / 12) if dequantized and column.kind != "real" else (0.0, 0.0)
        yield replace(column, mean=float(mean[i] + shift), std=float(np.sqrt(std[i] ** 2 + var)))


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column of (N, D), in float64, without a second copy of all rows."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]
    mean = sum(rows[block].sum(0, dtype=np.float64) for block in blocks) / len(rows)
    squares = sum(np.square(rows[block] - mean).sum(0) for block in blocks)
    return mean, np.sqrt(squares / len(rows))
