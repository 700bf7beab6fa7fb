"""Dates and times of a table: texts and timestamps to seconds since 1970, and back."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import numpy as np

DEFAULT = "%Y-%m-%d %H:%M:%S"
UNITS = {86400.0: "day", 3600.0: "hour", 60.0: "minute", 1.0: "second"}
CLOCKS = {  # what looks so may be one of these
    r"\d{1,2}:\d{2}": ["%H:%M"],
    r"\d{1,2}:\d{2}:\d{2}": ["%H:%M:%S"],
    r"\d{1,2}\.\d{2}\.\d{2}": ["%d.%m.%y", "%H.%M.%S"],
}
TWELVE_HOURS = ("{day}/%Y %I:%M %p", "{day}/%Y %I:%M:%S %p", "{day}/%y %I:%M %p")
LONGEST = 60  # characters of a date and a time
LOOKS_LIKE_TIME = re.compile(r"\d+[-/.:]\d+|[A-Za-z]{3}\D+\d|\d\s*[A-Za-z]{3}")


def guess_formats(text: str) -> list[str]:
    """The ``strftime`` formats that ``text`` may have, the likeliest first; [] if it is no date or time."""
    from pandas.tseries.api import guess_datetime_format

    text = text.strip()
    if len(text) > LONGEST:
        return []
    for pattern, formats in CLOCKS.items():
        if re.fullmatch(pattern, text):
            return [*formats]
    if not LOOKS_LIKE_TIME.search(text):
        return []
    days = ["%m/%d", "%d/%m"]
    if re.search(r"[ap]m$", text.lower()):
        return [pattern.format(day=day) for day in days for pattern in TWELVE_HOURS]
    with warnings.catch_warnings(action="ignore"):
        found = [guess_datetime_format(text, dayfirst=dayfirst) for dayfirst in (False, True)]
    if found[0] and found[0].startswith("%Y"):  # nobody writes the year, the day, the month
        return [re.sub("%z$", "Z", found[0]) if text.endswith("Z") else found[0]]
    return list(dict.fromkeys(filter(None, found)))


def to_seconds(values: Sequence | np.ndarray, written: str) -> np.ndarray:
    """Seconds since 1970 (UTC), float64 (N,), NaN where a value is missing.

    Args:
        values: numbers are seconds already; timestamps; or texts in the format ``written``.

    Raises:
        ValueError: a text is in another format.
    """
    import pandas as pd

    values = np.asarray(values)
    if values.dtype.kind in "fiu":
        return values.astype(np.float64)
    if values.dtype.kind != "M":
        values = pd.Series(values, dtype=object).where(lambda texts: texts.notna() & (texts != ""), None)
        is_iso = written.startswith("%Y-%m-%d")
        parsed = pd.to_datetime(values, format="ISO8601" if is_iso else written, utc=True)
        values = parsed.dt.tz_localize(None).to_numpy()
    values = values.astype("datetime64[us]")
    return np.where(np.isnat(values), np.nan, values.astype(np.int64) / 1e6)


def to_texts(seconds: np.ndarray, written: str) -> np.ndarray:
    """Times in the format ``written``, object (N,); None for NaN."""
    import pandas as pd

    known = np.isfinite(seconds)
    limit = 2.0**62 / 1e6  # of a count of microseconds
    micro = np.round(np.where(known, seconds, 0.0).clip(-limit, limit) * 1e6).astype(np.int64)
    times = pd.Series(micro.astype("datetime64[us]"))
    if "%z" in written:
        times = times.dt.tz_localize("UTC")
    texts = times.dt.strftime(written).to_numpy(dtype=object)
    texts[~known] = None
    return texts


def coarsest_unit(seconds: np.ndarray) -> float:
    """The longest of day, hour, minute and second of which all times are whole multiples; 0 if none is."""
    return next((unit for unit in UNITS if not np.fmod(seconds, unit).any()), 0.0)


def first_bad_text(texts: np.ndarray, rows: np.ndarray, written: str) -> tuple[int, str]:
    """The row and the text of the first value that is not in the format."""
    low, high = 0, len(texts)  # it is in texts[low:high]
    while high - low > 1:
        middle = (low + high) // 2
        try:
            to_seconds(texts[low:middle], written)
        except ValueError:
            high = middle
        else:
            low = middle
    return int(rows[low]), texts[low]
