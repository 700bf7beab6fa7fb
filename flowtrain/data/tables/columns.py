"""Columns of a table: from the values of a file to the numbers that a flow receives, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.tables import times
from flowtrain.data.tables.block import BLOCK
from flowtrain.data.tables.column import Column, Constant
from flowtrain.data.tables.table_file import is_number, missing_value_error
from flowtrain.errors import FlowtrainError, UsageError

BOOLEANS = {"false", "true"}
WORDS = {"categorical": "category"}  # as dataset.types has it


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a flow models, and those that it is conditional on.

    The flow receives a modelled number in the units of the file, minus the ``offset`` of its column; a text as its
    index among the categories; a time in seconds; NaN for a missing value. After these come the indicators of missing
    values. In a context, numbers are standardized by ``mean`` and ``std``, texts become one-hot vectors, an angle its
    cosine and sine, and a missing value 0, with an indicator after it.

    Attributes:
        modelled: ``mean`` and ``std`` are those of the train split, minus the offset and after dequantization, which
            adds ½ to the mean and 1/12 to the variance of an integer or categorical column.
        context: ``mean`` and ``std`` are those of the train split, minus the offset.
        constants: columns that are not modelled since all rows hold the same value.
    """

    modelled: tuple[Column, ...]
    context: tuple[Column, ...] = ()
    constants: tuple[Constant, ...] = ()

    @classmethod
    def from_rows(cls, rows: np.ndarray, names: Sequence[str] | None = None) -> Columns:
        """Real columns for rows (N, D) that do not come from a file. Default names are x0, x1, …."""
        names = names or [f"x{i}" for i in range(rows.shape[1])]
        return cls(tuple(Column(name, "real") for name in names)).with_moments(rows)

    def with_moments(
        self, rows: np.ndarray, context: np.ndarray | None = None, weights: np.ndarray | None = None
    ) -> Columns:
        """These columns with the means and standard deviations of a train split.

        Args:
            rows: the modelled columns, (N, D), as :func:`encode_values` returns them.
            context: the context columns before standardization, (N, columns), likewise.
            weights: of the rows, (N,); None: all the same.

        Raises:
            UsageError: a column of real numbers is constant; it is named.
        """
        context = np.empty((len(rows), 0)) if context is None else context
        return replace(
            self,
            modelled=tuple(_with_moments(self.modelled, rows[:, : len(self.modelled)], weights, dequantized=True)),
            context=tuple(_with_moments(self.context, context[:, : len(self.context)], weights, dequantized=False)),
        )

    @property
    def encoded(self) -> tuple[Column, ...]:
        """What each number of a flow's row is: a modelled column, or at the end an indicator of an incomplete one."""
        return self.modelled + tuple(Column(column.name, "indicator") for column in self.modelled if column.missing)

    @property
    def names(self) -> list[str]:
        """The names of the modelled columns."""
        return [column.name for column in self.modelled]

    @property
    def all_integer(self) -> bool:
        """Whether all modelled columns are integers or categories without gaps, so that bits per dimension are
        defined."""
        return all(column.kind in ("integer", "categorical") and not column.missing for column in self.modelled)

    @property
    def has_ranges(self) -> bool:
        """Whether the ranges of the train split are known, as they are except in checkpoints of earlier versions."""
        return all(column.least is not None for column in (*self.modelled, *self.context))

    @property
    def context_names(self) -> list[str]:
        return [column.name for column in self.context]

    @property
    def context_shape(self) -> tuple[int] | None:
        return (sum(map(_context_width, self.context)),) if self.context else None

    @property
    def texts(self) -> list[str]:
        """The names of the columns that are read as text, whatever they look like."""
        columns = (*self.modelled, *self.context)
        return [column.name for column in columns if column.categories and not {*column.categories} <= BOOLEANS]

    def encode(self, frame: Mapping, first_row: int = 1) -> tuple[Tensor, Tensor | None]:
        """Encode new rows for a flow: x, float32 (N, D), and their context, float32 (N, C), or None without one.

        Args:
            frame: a mapping from names to N values each, such as a pandas table. Other columns are ignored.
            first_row: the number of the first row in error messages.

        Raises:
            UsageError: a column or value is missing, a value is text instead of a number, a fraction instead of a
                whole number, outside of its bounds, or an unknown category. The message names the column and the row.
        """
        x = torch.from_numpy(encode_values(self.modelled, frame, first_row))
        return x, self.encode_context(frame, first_row) if self.context else None

    def encode_context(self, frame: Mapping, first_row: int = 1) -> Tensor:
        """Encode only the context, float32 (N, C); ``frame`` needs no other columns. Errors as in :meth:`encode`."""
        return self.standardize_context(encode_values(self.context, frame, first_row))

    def standardize_context(self, context: np.ndarray) -> Tensor:
        """Context values as :func:`encode_values` returns them, as a flow takes them: float32 (N, C)."""
        parts = []
        for column, values in zip(self.context, torch.from_numpy(context).unbind(1)):
            gaps = values.isnan()
            known = torch.where(gaps, 0, values)
            if column.categories:
                part = torch.nn.functional.one_hot(known.long(), len(column.categories)).float()
            elif column.kind == "angle":
                turn = known * (2 * math.pi / (column.high - column.low))
                part = torch.stack([turn.cos(), turn.sin()], 1)
            else:
                part = ((known - column.mean) / column.std)[:, None]
            parts.append(torch.where(gaps[:, None], 0, part))
            if column.missing:
                parts.append(gaps[:, None].float())
        return torch.cat(parts, 1)

    def outside(self, x: Tensor, context: Tensor | None = None) -> dict[str, Tensor]:
        """Where rows, as :meth:`encode` returns them, lie outside the range of the train split: by name, bool (N,) for
        each modelled and context column that has a range. Categories and angles have none; a missing value is in it.
        Only where these columns have :attr:`has_ranges`.
        """
        found = {
            column.name: (x[:, i] < column.least) | (x[:, i] > column.greatest)
            for i, column in enumerate(self.modelled)
            if column.kind not in ("categorical", "angle")
        }
        if not self.context:
            return found
        ends = np.array([[column.least, column.greatest] for column in self.context], dtype=np.float32).T
        least, greatest = self.standardize_context(ends)  # rounded as the context is
        place = 0
        for column in self.context:
            if column.kind not in ("categorical", "angle"):
                values = context[:, place]
                found[column.name] = (values < least[place]) | (values > greatest[place])
                if column.missing:
                    found[column.name] &= context[:, place + 1] == 0
            place += _context_width(column)
        return found

    def decode(self, x: Tensor) -> dict[str, np.ndarray]:
        """Rows (N, D) as the file would hold them, constant columns included: a mapping from names to N values,
        float64, int64, or objects: texts, and numbers with None where a value is missing."""
        values = x.detach().cpu().double().numpy()
        found = [(column.name, _decode_column(column, values[:, i])) for i, column in enumerate(self.modelled)]
        for constant in self.constants:
            kind = object if constant.value is None or isinstance(constant.value, str) else None
            found.insert(constant.place, (constant.name, np.full(len(values), constant.value, dtype=kind)))
        return dict(found)

    def to_plot(self, x: Tensor) -> dict[str, np.ndarray]:
        """Rows (N, D) for a plot: modelled columns as :meth:`decode` has them, but times in days from the first."""
        table = self.decode(x)
        found = {}
        for i, column in enumerate(self.modelled):
            if column.kind == "time":
                found[f"{column.name} (days)"] = x[:, i].double().cpu().numpy() / 86400
            else:
                found[column.name] = table[column.name]
        return found

    def describe(self) -> list[str]:
        """A line for each type of column: the names of those that have it."""
        lines = [f"{kind}: {names}" for kind, names in _by_kind(self.modelled)]
        lines += [f"context, {kind}: {names}" for kind, names in _by_kind(self.context)]
        if self.constants:
            lines.append(
                "constant: "
                + ", ".join(f"{one.name} ({'no values' if one.value is None else one.value})" for one in self.constants)
            )
        return lines

    def to_record(self) -> dict:
        """These columns as plain data, for a checkpoint."""
        record = {key: [asdict(item) for item in getattr(self, key)] for key in ("modelled", "context", "constants")}
        for item in (*record["modelled"], *record["context"]):
            item["categories"] = list(item["categories"])
        return record

    @classmethod
    def from_record(cls, record: dict) -> Columns:
        """The inverse of :meth:`to_record`. Raises FlowtrainError for a damaged record."""
        try:
            modelled, context = (
                tuple(Column(**item | {"categories": tuple(item["categories"])}) for item in record[key])
                for key in ("modelled", "context")
            )
            return cls(modelled, context, tuple(Constant(**item) for item in record["constants"]))
        except (KeyError, TypeError) as error:
            raise FlowtrainError(f"the record of a table's columns is damaged: {error}") from error


def encode_values(columns: Sequence[Column], frame: Mapping, first_row: int) -> np.ndarray:
    """Columns of ``frame`` as float32 (N, columns + gaps): numbers minus their offset, times in seconds, texts as
    indices of categories, NaN where a value is missing; then for each column that may have gaps, 1 where it has one.

    Raises UsageError as :meth:`Columns.encode` does.
    """
    for column in columns:
        if column.name not in frame:
            raise UsageError(f"column '{column.name}' is missing")
    parts = [_encode_column(column, frame[column.name], first_row) for column in columns]
    parts += [np.isnan(part) for column, part in zip(columns, parts) if column.missing]
    return np.stack(parts, 1).astype(np.float32)


def _encode_column(column: Column, values: Iterable, first_row: int) -> np.ndarray:
    """float64 (N,)."""
    encode = {"categorical": _encode_texts, "time": _encode_times}.get(column.kind, _encode_numbers)
    encoded = encode(column, values, first_row)
    if not column.missing and np.isnan(encoded).any():
        raise missing_value_error(column.name, first_row + int(np.isnan(encoded).argmax()))
    return encoded


def _encode_texts(column: Column, values: Iterable, first_row: int) -> np.ndarray:
    import pandas as pd

    index = pd.Index(column.categories, dtype=object)
    values = np.asarray(values, dtype=object)
    found = index.get_indexer(values).astype(np.float64)
    for row in np.flatnonzero(found < 0):  # booleans and numbers are not text yet
        text = _text(values[row])
        if text is None:
            found[row] = np.nan
        elif text in column.categories:
            found[row] = column.categories.index(text)
        else:
            known = ", ".join(column.categories[:12]) + (", …" if len(column.categories) > 12 else "")
            raise UsageError(f"column '{column.name}', row {first_row + row}: '{text}' is not one of {known}")
    return found


def _encode_times(column: Column, values: Iterable, first_row: int) -> np.ndarray:
    try:
        return times.to_seconds(values, column.written) - column.offset
    except ValueError as error:
        rows = np.arange(first_row, first_row + len(values))
        row, text = times.first_bad_text(np.asarray(values, dtype=object), rows, column.written)
        raise UsageError(f"column '{column.name}', row {row}: '{text}' is no time such as {column.written}") from error


def _encode_numbers(column: Column, values: Iterable, first_row: int) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(values):
            if _text(value) is not None and not is_number(value):
                text = f"column '{column.name}', row {first_row + row}: '{value}' is not a number"
                raise UsageError(text) from None
        numbers = np.array([np.nan if _text(value) is None else float(value) for value in values])

    def refuse(where: np.ndarray, why: str) -> None:
        if where.any():
            row = int(where.argmax())
            raise UsageError(f"column '{column.name}', row {first_row + row}: {numbers[row]:g} {why}")

    with np.errstate(over="ignore", invalid="ignore"):  # too large a number, or a signalling NaN, is refused below
        encoded = numbers - column.offset
        refuse(np.isinf(encoded.astype(np.float32)), "is not a finite number in float32")
        if column.kind == "angle":
            return (numbers - column.low) % (column.high - column.low) + column.low
        if column.low is not None:
            refuse(numbers < column.low, f"is below its bound {column.low:g}")
        if column.high is not None:
            refuse(numbers > column.high, f"is above its bound {column.high:g}")
    if column.kind == "integer":
        refuse(~np.isnan(encoded) & (encoded != np.floor(encoded)), "is not a whole number")
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


def _decode_column(column: Column, values: np.ndarray) -> np.ndarray:
    gaps = np.isnan(values)
    if column.kind == "time":
        return times.to_texts(values + column.offset, column.written)
    if column.kind not in ("integer", "categorical"):
        return values + column.offset
    codes = np.rint(np.where(gaps, 0, values)).astype(np.int64)
    if column.kind == "categorical":
        decoded = np.array(column.categories, dtype=object)[codes.clip(0, len(column.categories) - 1)]
    else:
        decoded = codes + (int(column.offset) if column.offset.is_integer() else column.offset)
    if gaps.any():
        decoded = decoded.astype(object)
        decoded[gaps] = None
    return decoded


def _context_width(column: Column) -> int:
    return (len(column.categories) or (2 if column.kind == "angle" else 1)) + column.missing


def _by_kind(columns: Sequence[Column]) -> Iterator[tuple[str, str]]:
    for kind in dict.fromkeys(column.kind for column in columns):
        yield WORDS.get(kind, kind), ", ".join(map(_describe, (column for column in columns if column.kind == kind)))


def _describe(column: Column) -> str:
    parts = []
    if column.categories:
        parts.append(f"{len(column.categories)} values")
    if column.low is not None or column.high is not None:
        ends = ["" if end is None else f"{end:.6g}" for end in (column.low, column.high)]
        parts.append(" to ".join(ends).strip() if all(ends) else f"from {ends[0]}" if ends[0] else f"up to {ends[1]}")
    if column.kind == "time":
        first = times.to_texts(np.array([column.offset]), column.written)[0]
        parts.append(f"from {first}" + (f", by the {times.UNITS[column.unit]}" if column.unit else ""))
    if column.missing:
        parts.append("with gaps")
    return f"{column.name} ({', '.join(parts)})" if parts else column.name


def _with_moments(
    columns: Sequence[Column], rows: np.ndarray, weights: np.ndarray | None, dequantized: bool
) -> Iterator[Column]:
    if not columns:
        return
    mean, std = moments(rows, weights)
    counted = rows if weights is None else rows[weights > 0]
    least, greatest = np.fmin.reduce(counted, 0), np.fmax.reduce(counted, 0)  # which ignore NaN
    constant = least == greatest
    for i, column in enumerate(columns):
        width = column.width if dequantized else 0.0
        what = "has no values" if np.isnan(mean[i]) else "is constant" if constant[i] or std[i] == 0 else None
        if what == "has no values" or what and not width:
            raise UsageError(
                f"column '{column.name}' {what} in the {len(rows):,} rows of the train split, so it has no"
                " density; leave it out with dataset.columns=[…]"
            )
        yield replace(
            column,
            mean=float(mean[i] + width / 2),
            std=float(np.sqrt(std[i] ** 2 + width**2 / 12)),
            least=float(least[i]),
            greatest=float(greatest[i]),
        )


def moments(rows: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of each column of rows (N, D) without its gaps, in float64.

    Rows count by ``weights`` (N,). No copy of all rows is made.
    """
    blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]

    def average(of_block) -> np.ndarray:
        total, count = 0.0, 0.0
        for block in blocks:
            values = of_block(rows[block].astype(np.float64))
            weight = np.where(np.isnan(values), 0.0, 1.0 if weights is None else weights[block, None])
            total, count = total + (weight * np.nan_to_num(values)).sum(0), count + weight.sum(0)
        return total / np.where(count > 0, count, np.nan)

    mean = average(lambda values: values)
    return mean, np.sqrt(average(lambda values: np.square(values - mean)))
