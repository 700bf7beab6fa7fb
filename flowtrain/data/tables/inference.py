"""What each column of a table is, by its values in all rows and by what the user says of it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowtrain.data.tables import times
from flowtrain.data.tables.block import is_missing
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.table_file import TableFile, is_number
from flowtrain.data.tables.types import Declared
from flowtrain.errors import UsageError

log = logging.getLogger(__name__)

MOST_CATEGORIES = 1000  # a column of more different texts holds names, not categories
MOST_DECLARED = 2**16  # even where the user says that they are categories
EXACT = 2.0**22  # up to here float32 distinguishes x from x + ½
WHOLE = 2.0**53  # up to here float64 distinguishes x from x + 1
DAY = max(times.UNITS)  # the coarsest unit of times, in seconds
FEW = 20  # of so few whole numbers, all different is no sign of an identifier
# numbers in forms that are not read: 12,5 or 1.234,5 or 1'234 or 12 % or $12 or 1.5D-3 or 1.5 ± 0.1
NUMBER = r"[-+]?[$€£¥]?\s?(\d+|\d{1,3}([.,' ]\d{3})+)([.,]\d+)?([dDeE][-+]?\d+)?\s?[%$€£¥]?"
OTHER_FORMS = re.compile(rf"{NUMBER}(\s?(±|\+/-)\s?{NUMBER})?")
ODD = 0.05  # of texts that are all different and else numbers, at most so many are no numbers: not identifiers


@dataclass(frozen=True)
class Dropped:
    """A column that is not modelled.

    Attributes:
        name: as in the file.
        why: for the user.
        is_constant: whether all rows hold ``value``; else it is an identifier.
        value: a number or a text; None: every value is missing.
    """

    name: str
    why: str
    is_constant: bool = False
    value: str | float | int | None = None


@dataclass(frozen=True)
class Survey:
    """What the rows of a table hold.

    Attributes:
        rows: their number.
        columns: by name.
        gaps: of each column with missing values: their number and the first row, from 1.
    """

    rows: int
    columns: dict[str, Column | Dropped]
    gaps: dict[str, tuple[int, int]]


def survey(
    file: TableFile, names: Sequence[str], types: Mapping[str, Declared], named: Collection[str], gaps: bool
) -> Survey:
    """Read the columns ``names`` once.

    Args:
        types: what the user says of some.
        named: those that the user asks for by name, which are not left out as identifiers.
        gaps: whether missing values are modelled.

    Raises:
        UsageError: a value is infinite, or not of the type that the user gives.
    """
    kinds = file.kinds(names)
    found = {name: FINDERS[kinds[name]](name, types.get(name)) for name in names}
    rows = 0
    for block in file.blocks(names):
        for name, finder in found.items():
            finder.update(block[name], rows + 1)
        rows += len(block[names[0]])
    if not rows:
        raise UsageError(f"{file.path} has no rows")
    return Survey(
        rows,
        {name: finder.column(name in named, gaps) for name, finder in found.items()},
        {name: (finder.gaps, finder.first_gap) for name, finder in found.items() if finder.gaps},
    )


class _Finder:
    """Sees a column's values in blocks; then says what it is."""

    def __init__(self, name: str, declared: Declared | None):
        self.name, self.declared = name, declared
        self.rows, self.gaps, self.first_gap = 0, 0, 0
        self._different: list[np.ndarray] | None = []  # all values, or hashes of them, while no two are equal

    def update(self, values: np.ndarray, row: int) -> None:
        """``values`` (N,) are those of the rows ``row``, ``row`` + 1, …."""
        missing = is_missing(values)
        if missing.any():
            self.first_gap = self.first_gap or row + int(missing.argmax())
            self.gaps += int(missing.sum())
        self.rows += len(values)
        where = np.flatnonzero(~missing)
        if len(where):
            self._update(values[where], row + where)

    def column(self, named: bool, gaps: bool) -> Column | Dropped:
        """``named``: the user asks for it by name; ``gaps``: missing values are modelled."""
        if self.gaps == self.rows:
            return Dropped(self.name, "has no values", True)
        found = self._column(named, gaps and self.gaps > 0)
        if isinstance(found, Column) and gaps and self.gaps:
            return replace(found, missing=True)
        return found

    def _update(self, values: np.ndarray, rows: np.ndarray) -> None:
        raise NotImplementedError

    def _column(self, named: bool, missing: bool) -> Column | Dropped:
        raise NotImplementedError

    def _note_different(self, values: np.ndarray) -> None:
        if self._different is not None:
            self._different.append(values)
            if len(np.unique(values)) < len(values):
                self._different = None

    def _all_different(self) -> bool:
        if self._different is None:
            return False
        values = np.concatenate(self._different)
        return len(np.unique(values)) == len(values)


class _Numbers(_Finder):
    def __init__(self, name, declared):
        super().__init__(name, declared)
        self.offset: float | None = None
        self.whole, self.first_fraction = True, 0
        self.least, self.greatest = np.inf, -np.inf
        self.unit = DAY  # of times

    def _update(self, values, rows):
        infinite = np.isinf(values)
        if infinite.any():
            raise UsageError(
                f"column '{self.name}', row {rows[infinite.argmax()]}: {values[infinite][0]} is not finite"
            )
        if self.offset is None:
            first = float(values[0])
            with np.errstate(over="ignore"):  # too large a number is refused below
                self.offset = first if abs(first) > 1000 * values.std() else 0.0
            self.repeats = len(values) >= 1000 and len(np.unique(values)) < len(values) / 10
        if self.whole:
            fractions = values != np.floor(values)
            if fractions.any():
                self.whole, self.first_fraction = False, int(rows[fractions.argmax()])
                self._different = None
            else:
                self._note_different(values)
        if self.declared and self.declared.kind == "time":
            self.unit = min(self.unit, times.coarsest_unit(values))
        self.least, self.greatest = min(self.least, values.min()), max(self.greatest, values.max())

    def _column(self, named, missing):
        kind = self.declared.kind if self.declared else None
        if self.least == self.greatest:
            value = int(self.least) if self.whole and abs(self.least) < WHOLE else float(self.least)
            if not missing:
                more = "" if abs(self.least) < WHOLE else ", as far as float64 tells such numbers apart"
                return Dropped(self.name, f"is {value:g} in every row{more}", True, value)
            return Column(self.name, "integer", offset=float(value))
        if kind == "integer" and not self.whole:
            raise UsageError(
                f"column '{self.name}', row {self.first_fraction}: not a whole number; dataset.types says so"
            )
        if kind == "angle":
            return self._angle(self.declared.period)
        if kind == "time":
            return _time(self.name, self.least, self.greatest, self.unit, self.declared.written or times.DEFAULT)
        if self.declared and (self.declared.low, self.declared.high) != (None, None):
            return Column(self.name, "real", low=self.declared.low, high=self.declared.high)
        if not named and self.whole and self._all_different():
            counts = self.greatest - self.least == self.rows - self.gaps - 1
            if self.rows >= FEW or counts and self.rows > 2:
                return Dropped(self.name, "holds a different whole number in every row, as an identifier does")
        reach = max(abs(self.least - self.offset), abs(self.greatest - self.offset))
        if reach > np.finfo(np.float32).max:
            raise UsageError(f"column '{self.name}': values up to {reach:g} are too large for float32")
        if kind == "real":
            return Column(self.name, "real", offset=self.offset)
        return Column(self.name, self._guess(reach), offset=self.offset)

    def _guess(self, reach: float) -> str:
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
        return "integer" if is_integer else "real"

    def _angle(self, period: float | None) -> Column:
        if period is None:
            period = 2 * math.pi if max(abs(self.least), abs(self.greatest)) <= 2 * math.pi * (1 + 1e-6) else 360.0
        low = -period / 2 if self.least < 0 else 0.0
        return Column(self.name, "angle", low=low, high=low + period)


class _Texts(_Finder):
    def __init__(self, name, declared):
        super().__init__(name, declared)
        self.first: dict[str, int] = {}  # text -> its first row
        self.most = MOST_DECLARED if declared and declared.kind == "categorical" else MOST_CATEGORIES
        self.times: dict[str, _Times] = {}
        self.formats: list[str] | None = None  # that all texts so far may have as times
        if declared and declared.kind not in ("categorical", "time"):
            self.most = 1  # refused at the end

    def _update(self, values, rows):
        import pandas as pd

        if self._different is not None:
            self._note_different(pd.util.hash_array(values, categorize=False))
        if len(self.first) <= self.most:
            texts = pd.Series(values, index=rows, dtype=object).drop_duplicates()
            self.first = {text: int(row) for row, text in texts.items()} | self.first
        self._update_time(values, rows)

    def _update_time(self, values, rows) -> None:
        if self.declared and self.declared.kind != "time":
            return
        if self.formats is None:
            own = self.declared.written if self.declared else None
            self.formats = [own] if own else times.guess_formats(values[0])
            self.times = {written: _Times(self.name, None) for written in self.formats}
        for written in [*self.formats]:
            try:
                seconds = times.to_seconds(values, written)
            except ValueError as error:
                if self.declared and len(self.formats) == 1:
                    row, text = times.first_bad_text(values, rows, written)
                    raise UsageError(
                        f"column '{self.name}', row {row}: '{text}' is no time in the format {written}"
                    ) from error
                self.formats.remove(written)
            else:
                self.times[written].update_seconds(seconds)
        if self.declared and not self.formats:
            raise UsageError(
                f"column '{self.name}', row {rows[0]}: '{values[0]}' is no time in a known format; give the format,"
                f" dataset.types={{{self.name}: '%d/%m/%Y'}}"
            )

    def _column(self, named, missing):
        if self.declared and self.declared.kind not in ("categorical", "time"):
            text = min(self.first, key=self.first.get)
            raise UsageError(
                f"column '{self.name}', row {self.first[text]}: '{text}' is not a number; dataset.types says so"
            )
        if len(self.first) == 1 and not missing:
            (value,) = self.first
            return Dropped(self.name, f"is '{value}' in every row", True, value)
        if self.formats:
            return self._time()
        if not named and self._all_different() and self.rows > 2:
            self._check_numbers(ODD)
            return Dropped(self.name, "holds a different text in every row, as an identifier does")
        if len(self.first) > self.most:
            why = f"holds more than {self.most:,} different texts, too many for categories"
            if named:
                raise UsageError(f"column '{self.name}' {why}; leave it out with dataset.columns=[…]")
            return Dropped(self.name, why)
        if not self.declared:
            self._check_numbers()
        return Column(self.name, "categorical", tuple(sorted(self.first)))

    def _time(self) -> Column:
        written = self.formats[0]
        if len(self.formats) > 1:
            log.warning(
                "column '%s': times read as %s; dataset.types={%s: '%s'} reads them otherwise",
                self.name,
                written,
                self.name,
                self.formats[1],
            )
        return self.times[written].time(written)

    def _check_numbers(self, most: float = 0.5) -> None:
        """Refuse texts that are numbers in another form, or but for a share of less than ``most``."""
        others = [text for text in self.first if not is_number(text)]
        if 0 < len(others) < len(self.first) * most:  # such as ? for a missing value
            why = "is not a number, but most values of the column are"
        elif others and all(map(OTHER_FORMS.fullmatch, self.first)):
            why = "is a number in a form that cannot be read; write 1234.5"
        else:
            return
        text = min(others, key=self.first.get)
        raise UsageError(
            f"column '{self.name}', row {self.first[text]}: '{text}' {why}; dataset.types={{{self.name}: category}}"
            f" takes them as texts, dataset.read={{na_values: ['{text}']}} as missing"
        )


class _Times(_Finder):
    def __init__(self, name, declared):
        super().__init__(name, declared)
        self.least, self.greatest, self.unit = np.inf, -np.inf, DAY

    def _update(self, values, rows):
        self.update_seconds(times.to_seconds(values, times.DEFAULT))

    def update_seconds(self, seconds: np.ndarray) -> None:
        self.least, self.greatest = min(self.least, seconds.min()), max(self.greatest, seconds.max())
        self.unit = min(self.unit, times.coarsest_unit(seconds))

    def time(self, written: str) -> Column:
        return _time(self.name, self.least, self.greatest, self.unit, written)

    def _column(self, named, missing):
        if self.declared and self.declared.kind != "time":
            raise UsageError(f"column '{self.name}' holds times; dataset.types says otherwise")
        written = (self.declared and self.declared.written) or ("%Y-%m-%d" if self.unit == DAY else times.DEFAULT)
        if not self.declared and self.unit == 0:
            written += ".%f"
        if self.least == self.greatest and not missing:
            value = times.to_texts(np.array([self.least]), written)[0]
            return Dropped(self.name, f"is {value} in every row", True, value)
        return self.time(written)


FINDERS = {"number": _Numbers, "text": _Texts, "boolean": _Texts, "time": _Times}


def _time(name: str, least: float, greatest: float, unit: float, written: str) -> Column:
    """A column of times between two, in seconds since 1970, which are multiples of ``unit`` (0: any).

    Its noise is only used where float32 resolves it.
    """
    unit = unit if unit and (greatest - least) / unit <= EXACT else 0.0
    return Column(name, "time", offset=float(least), written=written, unit=unit)
