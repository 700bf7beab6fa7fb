"""Blocks of rows, as every reader of a table yields them, and what readers of different files share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from flowtrain.errors import UsageError

BLOCK = 2**16  # the most rows of a block
CELLS = 2**22  # about the most values of a block
LEAVE_OUT = "dataset.columns=[…] names the columns to read"  # after what is wrong with another
MOST_COLUMNS = 100_000  # more take minutes to look through, and are likely rows that were meant as columns
INDEX_NAMES = ("", "Unnamed: 0", "__index_level_0__")  # of an index that was written as a column

# name -> float64, NaN if missing; or texts, None if missing; or datetime64[us], NaT; or "true" and "false", None
Block = dict[str, np.ndarray]
Kind = Literal["number", "text", "time", "boolean"]


class Reader:
    """A file of one format.

    Attributes:
        names: of its columns: unique, without blanks around them.
        notes: one line for each decision that a user should know.
    """

    names: list[str]
    notes: list[str]

    def kinds(self, names: Sequence[str]) -> dict[str, Kind]:
        """What each of these columns holds. Raises UsageError for one that can be no column of a table."""
        raise NotImplementedError

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        """Yield these columns of all rows in order, at least one column."""
        raise NotImplementedError


def rows_of_block(columns: int) -> int:
    """The rows of a block of so many columns."""
    return max(1, min(BLOCK, CELLS // max(columns, 1)))


def check_width(columns: int) -> None:
    """Raise UsageError for too many columns."""
    if columns > MOST_COLUMNS:
        raise UsageError(
            f"it has {columns:,} columns, more than {MOST_COLUMNS:,}; if its rows are examples of one kind of number,"
            " write it as an array and read it with dataset=arrays"
        )


def name_columns(given: Iterable) -> tuple[list[str], list[str]]:
    """Unique names from those in a file, and notes on what was changed: blanks go, a column without a name is called
    after its place, and equal names are numbered."""
    names = [" ".join(str(name).split()) for name in given]
    check_width(len(names))
    nameless = [i for i, name in enumerate(names) if not name]
    for i in nameless:
        names[i] = f"c{i}"
    unique, taken, numbered = [], set(names), []
    seen: dict[str, int] = {}
    for name in names:
        number = seen[name] = seen.get(name, 0) + 1
        if number > 1:
            while (other := f"{name}_{number}") in taken:
                number += 1
            seen[name], name = number, other
            taken.add(name)
            numbered.append(name)
        unique.append(name)
    notes = []
    if nameless:
        notes.append(f"columns without a name are called {join_names([f'c{i}' for i in nameless])}")
    if numbered:
        notes.append(f"columns whose name occurs before are called {join_names(numbered)}")
    return unique, notes


def is_missing(values: np.ndarray) -> np.ndarray:
    """Which values of a column of a block are missing, bool (N,)."""
    if values.dtype.kind == "M":
        return np.isnat(values)
    if values.dtype.kind == "f":
        return np.isnan(values)
    return np.fromiter((value is None for value in values), bool, len(values))


def counts(values: np.ndarray) -> bool:
    """Whether numbers are 0, 1, 2, … or 1, 2, 3, …: an index. Two of them are enough."""
    return len(values) > 1 and values[0] in (0, 1) and bool((np.diff(values) == 1).all())


def index_note(name: str) -> str:
    """The note on an index that is left out."""
    called = f"called '{name}'" if name else "without a name"
    return f"the column {called} is left out: it is an index"


def number_texts(values: np.ndarray) -> np.ndarray:
    """Numbers as texts: 3 for 3.0, None for NaN."""
    distinct, places = np.unique(values, return_inverse=True)
    texts = [None if np.isnan(value) else f"{value:.15g}" for value in distinct]
    return np.array([*texts, None], dtype=object)[places]


def boolean_texts(values: np.ndarray) -> np.ndarray:
    """Booleans as "true" and "false"."""
    return np.array(["false", "true"], dtype=object)[values.astype(np.intp)]


def time_texts(values: np.ndarray) -> np.ndarray:
    """Times as texts in ISO 8601, None for NaT."""
    texts = np.datetime_as_string(values).astype(object)
    texts[np.isnat(values)] = None
    return texts


def check_options(read: Mapping, known: Iterable[str], reader: str, refused: Mapping[str, str]) -> None:
    """Raise UsageError for an option of ``dataset.read`` that is not ``known`` to a ``reader``; ``refused`` says what
    takes the place of some."""
    known = sorted(known)
    for name in read:
        if name in known:
            continue
        if name in refused:
            raise UsageError(f"dataset.read.{name}: {refused[name]}")
        near = nearest(str(name), known)
        hint = f"did you mean '{near}'?" if near else f"there are {join_names(known, 30)}" if known else "it has none"
        raise UsageError(f"dataset.read.{name} is not an option for {reader}; {hint}")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The most similar of the ``known`` names; None if none is similar."""
    import difflib

    lower = {other.lower(): other for other in known}
    return next((lower[near] for near in difflib.get_close_matches(name.lower(), lower, 1)), None)


def join_names(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")
