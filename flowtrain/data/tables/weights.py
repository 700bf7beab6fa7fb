"""The column of a table that says how much each row counts (``dataset.weights``)."""

from __future__ import annotations

import numpy as np

from flowtrain.data.tables.table_file import TableFile
from flowtrain.errors import UsageError


def read_weights(file: TableFile, column: str | int | None) -> np.ndarray | None:
    """The weights of all rows, float64 (N,), divided by the largest so that sums are finite; None without a column.

    Raises:
        UsageError: one is not a finite number of at least 0; the message names the column and the row.
    """
    if column is None:
        return None
    (name,) = file.find_columns("weights", [column])
    parts, row = [], 1
    for block in file.blocks([name]):
        values = block[name]
        weights = values if values.dtype == np.float64 else np.array([_number(value) for value in values])
        wrong = ~(np.isfinite(weights) & (weights >= 0))
        if wrong.any():
            first = int(wrong.argmax())
            raise UsageError(
                f"dataset.weights: column '{name}', row {row + first} (the first is 1): {_describe(values[first])}; a"
                " weight is a number of at least 0"
            )
        parts.append(weights)
        row += len(weights)
    weights = np.concatenate(parts)
    return weights / (weights.max() or 1.0)


def split_weights(
    column: str | int | None, weights: np.ndarray | None, parts: dict[str, np.ndarray]
) -> dict[str, np.ndarray | None]:
    """The weights of each split, from the row numbers in it. Raises UsageError where no row of a split counts."""
    if weights is None:
        return dict.fromkeys(parts)
    out = {part: weights[index] for part, index in parts.items()}
    for part, found in out.items():
        if not found.any():
            raise UsageError(f"dataset.weights: column '{column}' is 0 in all {len(found):,} rows of the {part} split")
    return out


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _describe(value) -> str:
    """What a file holds in place of a weight."""
    missing = value is None or isinstance(value, float) and np.isnan(value)
    return "its value is missing" if missing else f"'{value}'"
