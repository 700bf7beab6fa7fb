"""JSON lines: .jsonl and .ndjson, an object in each line."""

from __future__ import annotations

import inspect
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from flowtrain.data.tables.block import (
    BLOCK,
    LEAVE_OUT,
    Block,
    Kind,
    Reader,
    check_options,
    check_width,
    join_names,
    name_columns,
    number_texts,
)
from flowtrain.data.tables.text_stream import LONGEST, open_file
from flowtrain.errors import UsageError

log = logging.getLogger(__name__)

HEAD_ROWS = 2000  # rows that show the kinds of columns
SET = ("path_or_buf", "lines", "chunksize", "compression", "orient", "typ", "engine", "storage_options")
SET = (*SET, "dtype", "dtype_backend", "convert_dates", "convert_axes")
REFUSED = dict.fromkeys(SET, "each line is read as an object of JSON")
KINDS = {"boolean": ({bool}, "true or false"), "number": ({int, float}, "a number"), "text": ({str}, "text")}


class JsonLines(Reader):
    """Objects, whose keys in the first ``HEAD_ROWS`` lines are the columns. A key that is absent is a missing value."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str]):
        import pandas as pd

        check_options(read, inspect.signature(pd.read_json).parameters.keys() - {*REFUSED}, "JSON lines", REFUSED)
        self.path, self.options, self.text = path, dict(read), {*text}
        head = next(self._frames(HEAD_ROWS), None)
        if head is None:
            raise UsageError("it is empty")
        self.names, self.notes = name_columns(head)
        self._keys = dict(zip(self.names, head))
        self._kinds = {name: _kind(head[key].tolist()) for name, key in self._keys.items()}

    def kinds(self, names):
        if wrong := [name for name in names if self._kinds[name] is None]:
            raise UsageError(f"lists, objects or several kinds in {join_names(wrong)}: {LEAVE_OUT}")
        return {name: "text" if name in self.text else self._kinds[name] for name in names}

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        kinds, row, known = self.kinds(names), 0, {*self._keys.values()}
        for frame in self._frames(BLOCK):
            if new := {*frame} - known:
                log.warning("%s: '%s' occurs only after %s rows and is left out", self.path, min(new), f"{row:,}")
                known |= new
            block = {}
            for name in names:
                values = frame[self._keys[name]] if self._keys[name] in frame else np.full(len(frame), None)
                block[name] = _values(name, np.asarray(values), self._kinds[name], kinds[name] == "text", row)
            yield block
            row += len(frame)

    def _frames(self, rows: int):
        """Yield pandas tables of ``rows`` lines, or of fewer that are ``LONGEST`` bytes together."""
        import pandas as pd

        row = 0
        with open_file(self.path) as file:
            while True:
                some = _some_lines(file, rows)
                if not some:
                    return
                check_width(max(line.count(b'":') for line in some))  # about the keys: too many take pandas minutes
                try:
                    frame = pd.read_json(io.BytesIO(b"".join(some)), lines=True, dtype=False, **self.options)
                except Exception:  # pandas raises many kinds
                    _name_row(some, row)
                    raise
                row += len(some)
                yield frame


def _some_lines(file, rows: int) -> list[bytes]:
    lines, size = [], 0
    for line in islice(iter(lambda: file.readline(LONGEST), b""), rows):
        if len(line) == LONGEST:
            raise UsageError(f"it has a line of more than {LONGEST / 2**20:.0f} MB")
        size += len(line)
        if line.strip():
            lines.append(line)
        if size > LONGEST // 4:
            break
    return lines


def _name_row(lines: list[bytes], before: int) -> None:
    """Raise UsageError for the first line that is no object of JSON."""
    for row, line in enumerate(lines, before + 1):
        try:
            is_object = isinstance(json.loads(line), dict)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise UsageError(f"row {row} (the first is 1) is no JSON: {error}") from error
        if not is_object:
            raise UsageError(f'row {row} (the first is 1) is no object of JSON, such as {{"a": 1.5}}')


def _is_missing(value) -> bool:
    return value is None or value == "" or isinstance(value, float) and np.isnan(value)


def _kind(values: list) -> Kind | None:
    """What values of JSON are together."""
    found = {type(value) for value in values if not _is_missing(value)}
    return next((kind for kind, (types, _) in KINDS.items() if found and found <= types), None if found else "number")


def _values(name: str, values: np.ndarray, kind: Kind, as_text: bool, row: int) -> np.ndarray:
    """A column as one of a block. Raises UsageError for a value of another kind, with its row."""
    if kind == "number" and values.dtype.kind in "iuf":
        numbers = values.astype(np.float64)
        return number_texts(numbers) if as_text else numbers
    types, what = KINDS[kind]
    listed = [None if _is_missing(value) else value for value in values.tolist()]
    for place, value in enumerate(listed, row + 1):
        if value is not None and type(value) not in types:
            raise UsageError(
                f"column '{name}', row {place} (the first is 1): {json.dumps(value, default=str)} is not {what},"
                " unlike the rows before it"
            )
    if kind == "number":
        numbers = np.array([np.nan if value is None else value for value in listed], dtype=np.float64)
        return number_texts(numbers) if as_text else numbers
    texts = [None if value is None else str(value).lower() if kind == "boolean" else value.strip() for value in listed]
    return np.array([*texts, None], dtype=object)[:-1]
