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
        low, high: bounds of a real column, in the units of the file and minus the offset; None: unbounded. Of an angle,
            the two values of the same point: −π and π, or 0 and 360.
        missing: whether values may be missing (``dataset.missing=model``): NaN in the rows.
        written: how samples of a time are written: a format of ``strftime``.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    offset: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    low: float | None = None
    high: float | None = None
    missing: bool = False
    written: str | None = None

    @property
    def is_dequantized(self) -> bool:
        """Whether its values are whole numbers, to which uniform noise is added."""
        return self.kind in ("integer", "categorical", "indicator")
