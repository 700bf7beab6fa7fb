"""The ways in which texts write numbers: 1234.5, 1,234.5, 1.234,5, 1 234, 1'234, 12 %."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SPACES = (" ", "\u00a0", "\u202f")  # between thousands; the others are the spaces that do not break a line
MISSING = frozenset(  # pandas' own marks, and those of other programs
    "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
    "|NAN|Null|none|-|?|.".split("|")
)
EXPONENT = r"(?:[eE][-+]?\d+)?"
NOT_FINITE = r"[-+]?(?i:inf|infinity|nan)"
GROUPED = {mark: rf"[-+]?[1-9]\d{{0,2}}(?:{re.escape(mark)}\d{{3}})+" for mark in ".,"}


@dataclass(frozen=True)
class Numerals:
    """A way to write numbers.

    Attributes:
        decimal: the mark before the fraction.
        thousands: the marks that may stand between groups of three digits.
        percent: whether a percent sign may follow.
    """

    decimal: str = "."
    thousands: tuple[str, ...] = ()
    percent: bool = False

    @cached_property
    def pattern(self) -> str:
        decimal = re.escape(self.decimal)
        whole = "|".join(
            [rf"\d{{1,3}}(?:{re.escape(mark)}\d{{3}})+(?:{decimal}\d*)?" for mark in self.thousands]
            + [rf"\d+(?:{decimal}\d*)?", rf"{decimal}\d+"]
        )
        return rf"(?:[-+]?(?:{whole}){EXPONENT}|{NOT_FINITE})" + (
            rf"(?:[{''.join(SPACES)}]?%)?" if self.percent else ""
        )

    def match(self, texts) -> np.ndarray:
        """Which of the texts (a pyarrow array without null) are such numbers."""
        from pyarrow import compute

        return compute.match_substring_regex(texts, rf"\A(?:{self.pattern})\z").to_numpy(zero_copy_only=False)

    def read(self, texts) -> np.ndarray:
        """The numbers, float64, that texts which :meth:`match` write. 12 % is 12."""
        from pyarrow import compute

        for mark in (*self.thousands, *(("%", *SPACES) if self.percent else ())):
            texts = compute.replace_substring(texts, mark, "")
        if self.decimal != ".":
            texts = compute.replace_substring(texts, self.decimal, ".")
        return np.fromiter(map(float, texts.to_pylist()), np.float64, len(texts))

    def __str__(self) -> str:
        marks = {" ": "a blank", "'": "an apostrophe", ".": "a point", ",": "a comma"}
        words = ["a decimal comma"] if self.decimal == "," else []
        words += [f"{marks.get(self.thousands[0], self.thousands[0])} between thousands"] if self.thousands else []
        words += ["a percent sign (12 % is read as 12)"] if self.percent else []
        return " and ".join(words)


def find_decimal(texts: Iterable[str], separator: str) -> str:
    """The decimal mark of a file, from some of its values. 1,234 may be 1.234 or 1234: what the other values show
    decides, or else a semicolon between columns, which goes with decimal commas."""
    comma = grouped = point = open_comma = False
    for text in texts:
        text = text.strip(" %\u00a0")
        if not re.fullmatch(rf"[-+]?[\d.,' \u00a0\u202f]*\d[.,]?{EXPONENT}", text):
            continue
        last = max(text.rfind(","), text.rfind("."))
        if last < 0:
            continue
        both = "," in text and "." in text
        mark = text[last]
        if not both and re.fullmatch(GROUPED[mark], text):
            if text.count(mark) > 1:
                grouped, comma = (True, comma) if mark == "," else (grouped, True)
            else:
                open_comma = open_comma or mark == ","
        elif text.count(mark) == 1:
            comma, point = comma or mark == ",", point or mark == "."
    if comma and not (point or grouped):
        return ","
    return "," if open_comma and not (comma or point or grouped) and separator == ";" else "."


def candidates(decimal: str) -> list[Numerals]:
    """The ways of writing that a column may have in a file with this decimal mark, from the plainest on."""
    other = "," if decimal == "." else "."
    return [
        Numerals(decimal),
        Numerals(decimal, percent=True),
        *(Numerals(decimal, marks, percent) for marks in ((other,), SPACES, ("'", "’")) for percent in (False, True)),
        *(Numerals(other, percent=percent) for percent in (False, True)),
    ]


def has_leading_zero(texts) -> bool:
    """Whether some text (of a pyarrow array) is a row of digits such as 01234: a postal code, not a number."""
    from pyarrow import compute

    return bool(compute.any(compute.match_substring_regex(texts, r"\A0\d+\z")).as_py())
