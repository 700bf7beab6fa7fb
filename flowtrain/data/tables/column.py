"""A column of a table, as a flow receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["real", "integer", "categorical", "time", "angle", "indicator"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: as in the file.
        kind: "real"; "integer" (every value is a whole number); "categorical" (text, or true and false); "time" (in
            seconds since 1970, written back as a date); "angle" (on a circle); "indicator" (of ``Columns.encoded``
            alone: 1 where the column of this name misses its value, else 0).
        categories: of a categorical column, its texts in order: text number i is encoded as i.
        offset: a number that is subtracted from the values because float32 resolves 1.6e9 seconds only to two minutes:
            0 unless the values are far from 0 and close together. A whole number if the values are.
        mean, std: of the train split, minus the offset.
        least, greatest: of the train split, minus the offset; None where a checkpoint does not hold them.
        low, high: bounds of a real column, in the units of the file and minus the offset; None: unbounded. Of an angle,
            the two values of the same point: −π and π, or 0 and 360.
        missing: whether values may be missing (``dataset.missing=model``): NaN in the rows.
        written: how samples of a time are written: a format of ``strftime``.
        unit: of a time, the seconds between the values that occur, such as those of a day; 0: any time occurs.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    offset: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    least: float | None = None
    greatest: float | None = None
    low: float | None = None
    high: float | None = None
    missing: bool = False
    written: str | None = None
    unit: float = 0.0

    @property
    def width(self) -> float:
        """The width of the uniform noise that is added to its values; 0 for none."""
        return 1.0 if self.kind in ("integer", "categorical", "indicator") else self.unit

    @property
    def is_dequantized(self) -> bool:
        """Whether its values are on a grid, so that uniform noise is added to them."""
        return self.width > 0


@dataclass(frozen=True)
class Constant:
    """A column whose rows all hold the same value: it is not modelled, and samples get the value back.

    Attributes:
        name: as in the file.
        value: a number or a text; None: every value is missing.
        place: its place among all columns of a sample.
    """

    name: str
    value: str | float | int | None
    place: int
