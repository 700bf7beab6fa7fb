"""The column of a table that says how much each row counts (``dataset.weights``)."""

from __future__ import annotations

import numpy as np

from flowtrain.errors import UsageError


def check_weights(name: str, values: np.ndarray, first_row: int) -> np.ndarray:
    """The values of the column of weights in a block of rows, float64 (N,).

    Raises:
        UsageError: one is not a finite number of at least 0; the message names the column and the row.
    """
    weights = values if values.dtype == np.float64 else np.array([_number(value) for value in values])
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise UsageError(
            f"dataset.weights: column '{name}', row {first_row + first} (the first is 1): {_describe(values[first])};"
            " a weight is a number of at least 0"
        )
    return weights


def split_weights(name: str, weights: np.ndarray, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of each split, from the row numbers in it, divided by the largest so that sums are finite.

    Raises UsageError where no row of a split counts.
    """
    weights = weights / (weights.max() or 1.0)
    out = {part: weights[index] for part, index in parts.items()}
    for part, found in out.items():
        if not found.any():
            raise UsageError(f"dataset.weights: column '{name}' is 0 in all {len(found):,} rows of the {part} split")
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
