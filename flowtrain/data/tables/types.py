"""What a user says of the columns of a table: ``dataset.types``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowtrain.errors import UsageError

KINDS = {
    "real": "real",
    "number": "real",
    "integer": "integer",
    "category": "categorical",
    "categorical": "categorical",
    "text": "categorical",
    "time": "time",
    "date": "time",
    "angle": "angle",
}
CIRCLES = {"degrees": 360.0, "radians": 6.283185307179586}


@dataclass(frozen=True)
class Declared:
    """The type that a user gives to a column.

    Attributes:
        kind: see :class:`flowtrain.data.tables.column.Column`.
        low, high: bounds of a real column; None: unbounded.
        period: of an angle; None: by its values.
        written: the format of a time; None: by its values.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    period: float | None = None
    written: str | None = None


def parse_types(types: Mapping) -> dict[str, Declared]:
    """``dataset.types`` by column name. Raises UsageError for a value that is no type."""
    return {str(name): _parse(str(name), value) for name, value in types.items()}


def _parse(name: str, value) -> Declared:
    if isinstance(value, str) and value in KINDS:
        return Declared(KINDS[value])
    if isinstance(value, str) and value in CIRCLES:
        return Declared("angle", period=CIRCLES[value])
    if isinstance(value, str) and "%" in value:
        return Declared("time", written=value)
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(map(_is_bound, value))
        and tuple(value) != (None,) * 2
    ):
        low, high = (None if bound is None else float(bound) for bound in value)
        if low is None or high is None or low < high:
            return Declared("real", low=low, high=high)
    raise UsageError(
        f"dataset.types: '{name}: {value}' must be one of {', '.join([*KINDS, *CIRCLES])}, a range such as [0,1] or"
        " [0,null], or the format of a time such as '%d/%m/%Y'"
    )


def _is_bound(value) -> bool:
    return value is None or isinstance(value, int | float) and not isinstance(value, bool)
