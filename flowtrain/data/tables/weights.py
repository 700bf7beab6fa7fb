"""The column of a table that says how much each row counts (``dataset.weights``)."""

from __future__ import annotations

import numpy as np

from flowtrain.errors import UsageError


def check_weights(name: str, values: np.ndarray, first_row: int) -> np.ndarray:
    """The values of the column of weights in a block of rows, float64 (N,).

    Raises:
        UsageError: one is not a number of at least 0, finite in float32; the message names the column and the row.
    """
    weights = values if values.dtype == np.float64 else np.array([_number(value) for value in values])
    with np.errstate(over="ignore"):
        wrong = ~(np.isfinite(weights.astype(np.float32)) & (weights >= 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise UsageError(
            f"dataset.weights: column '{name}', row {first_row + first} (the first is 1): {_describe(values[first])};"
            " a weight is a number of at least 0"
        )
    return weights


def check_split_weights(name: str, weights: dict[str, np.ndarray]) -> None:
    """Raise UsageError where no row of a split counts."""
    for part, found in weights.items():
        if not found.any():
            raise UsageError(f"dataset.weights: column '{name}' is 0 in all {len(found):,} rows of the {part} split")


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _describe(value) -> str:
    """What a file holds in place of a weight."""
    missing = value is None or isinstance(value, float) and np.isnan(value)
    return "its value is missing" if missing else f"'{value}'"
