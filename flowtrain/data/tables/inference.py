"""What each column of a file is, found in all its rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from flowtrain.data.tables.column import Column
from flowtrain.data.tables.table_file import TableFile, is_number, missing_value_error
from flowtrain.errors import UsageError

log = logging.getLogger(__name__)

MOST_CATEGORIES = 1000  # a column of more different texts holds names, not categories
EXACT = 2.0**22  # up to here float32 distinguishes x from x + ½
WHOLE = 2.0**53  # up to here float64 distinguishes x from x + 1
# numbers in forms that are not read: 12,5 or 1.234,5 or 1'234 or 12 %
OTHER_FORMS = re.compile(r"[-+]?(\d+|\d{1,3}([.,' ]\d{3})+)([.,]\d+)?\s?%?")


def infer_columns(file: TableFile, names: Sequence[str]) -> tuple[int, list[Column]]:
    """The number of rows, and a description of each column without mean and std. Reads these columns once.

    Raises:
        UsageError: a value is missing or not finite; the message names the column and the row.
    """
    rows, texts = 0, text_columns(file, names)
    found = {name: _TextColumn(name) if name in texts else _NumberColumn(name) for name in names}
    for block in file.blocks(names):
        for name in names:
            found[name].update(block[name], rows + 1)
        rows += len(block[names[0]])
    if not rows:
        raise UsageError(f"{file.path} has no rows")
    return rows, [found[name].column() for name in names]


def text_columns(file: TableFile, names: Sequence[str]) -> set[str]:
    """Which of the columns hold text, or true and false."""
    kinds = file.kinds(names)
    times = [name for name, kind in kinds.items() if kind == "time"]
    if times:
        raise UsageError(f"{file.path}: column '{times[0]}' holds times: write them as numbers, or leave it out")
    return {name for name, kind in kinds.items() if kind in ("text", "boolean")}


def context_width(file: TableFile, names: Sequence[str]) -> int:
    """The numbers in a context of these columns: one for each column of numbers, the number of categories for
    each column of text, for which all rows are read, once for each version of the file."""
    texts = sorted(text_columns(file, names))
    stat = file.path.stat()
    counts = _category_counts(str(file.path), tuple(texts), stat.st_mtime_ns, stat.st_size) if texts else ()
    return len(names) - len(texts) + sum(counts)


@lru_cache(maxsize=16)
def _category_counts(path: str, names: tuple[str, ...], *_version: int) -> tuple[int, ...]:
    return tuple(len(column.categories) for column in infer_columns(TableFile(path), names)[1])


class _TextColumn:
    def __init__(self, name: str):
        self.name, self.rows = name, {}  # text -> its first row

    def update(self, values: np.ndarray, row: int) -> None:
        new = set(values) - self.rows.keys()
        if new:
            values = list(values)
            self.rows |= {text: row + values.index(text) for text in new}
        if None in new:
            raise missing_value_error(self.name, self.rows[None])
        if len(self.rows) > MOST_CATEGORIES:
            raise UsageError(
                f"column '{self.name}' holds more than {MOST_CATEGORIES:,} different texts, too many for categories;"
                " leave it out with dataset.columns=[…]"
            )

    def column(self) -> Column:
        others = [text for text in self.rows if not is_number(text)]
        if 0 < len(others) < len(self.rows) / 2:  # such as ? for a missing value
            why = "is not a number, but most values of the column are"
        elif others and all(map(OTHER_FORMS.fullmatch, self.rows)):
            why = "is a number in a form that cannot be read; write 1234.5, or leave the column out"
        else:
            return Column(self.name, "categorical", tuple(sorted(self.rows)))
        text = min(others, key=self.rows.get)
        raise UsageError(f"column '{self.name}', row {self.rows[text]}: '{text}' {why}")


class _NumberColumn:
    def __init__(self, name: str):
        self.name, self.offset, self.whole = name, None, True
        self.least, self.greatest = np.inf, -np.inf

    def update(self, values: np.ndarray, row: int) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            raise missing_value_error(self.name, row + int(finite.argmin()))
        if self.offset is None:
            first = float(values[0])
            with np.errstate(over="ignore"):  # too large a number is refused below
                self.offset = first if abs(first) > 1000 * values.std() else 0.0
            self.repeats = len(values) >= 1000 and len(np.unique(values)) < len(values) / 10
        self.whole = self.whole and bool((values == np.floor(values)).all())
        self.least, self.greatest = min(self.least, values.min()), max(self.greatest, values.max())

    def column(self) -> Column:
        reach = max(abs(self.least - self.offset), abs(self.greatest - self.offset))
        if reach > np.finfo(np.float32).max:
            raise UsageError(f"column '{self.name}': values up to {reach:g} are too large for float32")
        exact = max(abs(self.least), abs(self.greatest)) < WHOLE
        is_integer = self.whole and exact and reach <= EXACT
        if not exact:
            log.warning(
                "column '%s': numbers up to %.16g, where neighbours are more than 1 apart in float64; read as real"
                " numbers, which are rounded",
                self.name,
                max(self.least, self.greatest, key=abs),
            )
        elif self.whole and not is_integer:
            log.warning(
                "column '%s': whole numbers from %.16g to %.16g, too far apart for float32 to dequantize;"
                " read as real numbers",
                self.name,
                self.least,
                self.greatest,
            )
        elif self.repeats and not is_integer:
            log.warning(
                "column '%s': real numbers that often repeat exactly, as rounded numbers do; the density there is"
                " unbounded",
                self.name,
            )
        return Column(self.name, "integer" if is_integer else "real", offset=self.offset)
