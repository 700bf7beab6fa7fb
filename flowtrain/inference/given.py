"""The rows that a program gives: arrays, tensors and pandas DataFrames, checked and split."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.data import ArraySplit, Columns
from flowtrain.data.spec import ColumnContext, DataSpec
from flowtrain.data.split import split_indices
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.frame import Frame

LEAST = 10  # rows that a density is fitted to
MOST_VALIDATED = 20_000  # rows: more would only cost time
RESOLVED = 64  # float32 must tell so many values in a column's standard deviation apart


@dataclass(frozen=True)
class Given:
    """Rows for training and for validation, in the place of a data set.

    Attributes:
        columns: of a DataFrame, its columns; they encode its rows.
        moments: mean and standard deviation of each number of a context, (2, C), by which the splits' are standardized;
            None where there is none, or where ``columns`` standardize it.
    """

    spec: DataSpec
    train: ArraySplit
    val: ArraySplit
    columns: Columns | None = None
    moments: Tensor | None = None
    augment = None


def given(
    x,
    context=None,
    *,
    columns: Sequence[str] | None = None,
    types: Mapping | None = None,
    missing: str = "refuse",
    val_size: float | int | None = None,
    seed: int = 0,
) -> Given:
    """Check and split what :func:`flowtrain.fit` is given; its arguments are described there.

    Raises:
        ValueError, or UsageError of a table: what is wrong with the rows.
    """
    if _is_frame(x):
        return _frame(x, context, columns, types, missing, val_size, seed)
    for name, value in (("columns", columns), ("types", types)):
        if value is not None:
            raise ValueError(f"{name}: only the columns of a DataFrame have names and types")
    if missing not in ("refuse", "drop"):
        raise ValueError(f"missing={missing}: must be refuse or drop; a DataFrame may also have model")
    rows = check_rows(x, "x", missing == "drop")
    contexts, moments, about = None, None, None
    if context is not None:
        contexts = check_rows(context, "context", missing == "drop")
        if len(contexts) != len(rows):
            raise ValueError(f"x has {len(rows)} rows, context {len(contexts)}: each row of x needs one of context")
        whole = ~np.isnan(rows).any(1) & ~np.isnan(contexts).any(1)
        rows, contexts = rows[whole], contexts[whole]
    else:
        rows = rows[~np.isnan(rows).any(1)]
    _check_number(rows)
    parts = split_indices(len(rows), validation_rows(len(rows), val_size), 0, seed)
    if contexts is not None:
        about = ColumnContext(tuple(f"c{i}" for i in range(contexts.shape[1])), tuple(contexts.shape[1:]))
        moments = _moments(contexts[parts["train"]], "context")
        contexts = torch.from_numpy((contexts - moments[0]) / moments[1]).float()
    _moments(rows[parts["train"]], "x")  # refuses what has no density
    values = torch.from_numpy(rows.astype(np.float32))
    names = [f"x{i}" for i in range(rows.shape[1])]
    known = Columns(tuple(Column(name, "real") for name in names)).with_moments(values[parts["train"]].numpy())
    train, val = (
        ArraySplit(values[parts[part]], f"{part} rows of x", None if contexts is None else contexts[parts[part]], own)
        for part, own in (("train", known), ("val", None))
    )
    spec = DataSpec("x", (rows.shape[1],), context=about, columns=known.encoded)
    return Given(spec, train, val, moments=None if moments is None else torch.from_numpy(moments))


def _frame(x, context, columns, types, missing, val_size, seed) -> Given:
    if context is not None and (_is_frame(context) or not _is_names(context)):
        raise ValueError("context: of a DataFrame, the names of its columns to be conditional on, such as ['age']")
    _check_number(x)
    keys: dict[str, Any] = {"columns": columns, "types": types, "missing": missing}
    share = validation_rows(len(x), val_size) / len(x)  # of the rows that are kept
    frame = Frame(x, context=context, split_seed=seed, val_size=share, **keys)
    train, val = frame.split("train"), frame.split("val")
    return Given(frame.spec, train, val, columns=train.columns)


def validation_rows(rows: int, val_size: float | int | None) -> int:
    """The number of ``rows`` for validation: ``val_size``, a number or a fraction; or where that is None a tenth, but
    up to a quarter of a short table, and of a long one at most 20,000.

    >>> [validation_rows(rows, None) for rows in (40, 150, 1_000, 10_000, 1_000_000)]
    [10, 37, 100, 1000, 20000]
    """
    if val_size is None:
        return min(max(rows // 10, min(rows // 4, 100)), MOST_VALIDATED)
    if isinstance(val_size, bool) or not isinstance(val_size, Real) or not 0 < val_size < rows:
        raise ValueError(f"val_size={val_size}: must be a fraction below 1, or a number of rows below {rows}")
    return max(1, int(rows * val_size if val_size < 1 else val_size))


def check_rows(values, name: str, gaps: bool = False) -> np.ndarray:
    """``values``, an array, a tensor or nested lists, as an array (N, D) of floats, which are finite, or with ``gaps``
    may be NaN.

    Raises:
        ValueError: what they are instead.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    found = np.asarray(values)
    if found.dtype.kind not in "fiub":
        raise ValueError(f"{name} holds {found.dtype}: must be numbers; a DataFrame may also have texts and times")
    if found.ndim != 2:
        hint = f"; {name}[:, None] is a column" if found.ndim == 1 else ""
        raise ValueError(f"{name} has shape {list(found.shape)}: must be rows, (N, D){hint}")
    if not found.size:
        raise ValueError(f"{name} is empty: its shape is {list(found.shape)}")
    found = found.astype(found.dtype if found.dtype in (np.float32, np.float64) else np.float64)
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(found.astype(np.float32)) & ~(gaps & np.isnan(found))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        value = found[row, column]
        what = "is missing (NaN)" if np.isnan(value) else f"{value:g} is not a finite number in float32"
        help = "; missing='drop' leaves such rows out, a DataFrame and missing='model' model what is missing"
        raise ValueError(f"{name}: the value of row {row}, column {column} {what}{help if np.isnan(value) else ''}")
    return found


def _check_number(rows) -> None:
    if len(rows) < LEAST:
        raise ValueError(f"x has {len(rows)} row{'s' * (len(rows) != 1)}; a density needs at least {LEAST}")


def _moments(rows: np.ndarray, name: str) -> np.ndarray:
    """Mean and standard deviation of each column, (2, D) float64. ValueError for a column that has no density."""
    mean, std = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    for column in range(rows.shape[1]):
        if rows[:, column].min() == rows[:, column].max():
            raise ValueError(
                f"{name}: column {column} is {rows[0, column]:g} in all {len(rows)} rows for training, so it has no"
                " density; leave it out"
            )
        if std[column] < RESOLVED * np.finfo(np.float32).eps * abs(mean[column]):
            raise ValueError(
                f"{name}: float32 does not resolve column {column}, of mean {mean[column]:g} and deviation"
                f" {std[column]:g}; subtract its mean first"
            )
    return np.stack([mean, std])


def _is_frame(x) -> bool:
    pandas = sys.modules.get("pandas")  # whoever has a DataFrame has imported it
    return pandas is not None and isinstance(x, pandas.DataFrame)


def _is_names(context) -> bool:
    return isinstance(context, list | tuple) and all(isinstance(name, str) for name in context)
