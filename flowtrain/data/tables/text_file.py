"""Delimited text: .csv, .tsv, .txt, .dat."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flowtrain.data.tables.block import Block, Kind, Reader, check_options, join_names
from flowtrain.data.tables.dialect import find_dialect
from flowtrain.data.tables.numerals import MISSING, Numerals, candidates, has_leading_zero
from flowtrain.data.tables.text_stream import COMPRESSIONS, text_pieces
from flowtrain.errors import UsageError

log = logging.getLogger(__name__)

LEADING_ZERO = re.compile(rb"(?:\A|[^0-9A-Za-z.,+-])0\d|,0\d+\s*[,\n]")  # perhaps of a postal code

# options of pandas.read_csv that are set here, and those that are passed on to it
OWN = ("comment", "decimal", "encoding", "encoding_errors", "header", "keep_default_na", "na_values", "names", "nrows")
OWN = (*OWN, "quotechar", "sep", "skiprows", "thousands")
PASSED = ("doublequote", "escapechar", "float_precision", "na_filter", "quoting", "skipinitialspace")
SYNONYMS = {"separator": "sep", "delimiter": "sep"}
KINDS = "dataset.types={column: category} sets the type of a column"
REFUSED = {
    "usecols": "dataset.columns=[…] chooses columns",
    "index_col": "dataset.columns=[…] chooses columns",
    "skipfooter": "remove these lines from the file",
    "compression": "the end of the file's name says it",
    "on_bad_lines": "a row of another length is refused",
    **dict.fromkeys(("dtype", "converters", "parse_dates", "true_values", "false_values", "dayfirst"), KINDS),
    **dict.fromkeys(("engine", "chunksize", "iterator", "low_memory", "memory_map"), "the file is read in blocks"),
}
CHUNK = 2**24  # bytes of text that become one block
BOOLEANS = {form: form.lower() for form in ("true", "false", "True", "False", "TRUE", "FALSE")}
EXAMPLES = {"sep": ";", "decimal": ",", "thousands": ".", "quotechar": '"', "comment": "#", "encoding": "latin-1"}


class TextFile(Reader):
    """A delimited text. Its form and the kinds of its columns are found in its head, as far as ``read`` does not set
    them."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str]):
        self.path, self.options = path, _check(read)
        self.dialect = find_dialect(self._head(), self.options)
        strict = not {"quoting", "escapechar"} & {*read} and read.get("doublequote", True)
        self.records = self.dialect.records if strict else replace(self.dialect.records, strict=False)
        self.names, self.notes = self.dialect.names, self.dialect.notes
        self._place = dict(zip(self.names, self.dialect.places))
        given = self.options.get("na_values", ())
        given = [mark for marks in given.values() for mark in _list(marks)] if isinstance(given, Mapping) else given
        self.missing = {*map(str, _list(given)), *(MISSING if self.options.get("keep_default_na", True) else ())}
        self.numerals: dict[str, Numerals] = {}  # of the columns of numbers
        self._kinds: dict[str, Kind] = self._find_kinds({*text})
        self.notes += self._numeral_notes()
        self._warn_if_cut()

    def kinds(self, names):
        return {name: self._kinds[name] for name in names}

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        row, last = 0, self.options.get("nrows") or np.inf
        for chunk in self._chunks():
            block = self._columns(chunk, names, row)
            size = len(block[names[0]])
            if row + size >= last:
                yield {name: values[: int(last) - row] for name, values in block.items()}
                return
            yield block
            row += size

    def _warn_if_cut(self) -> None:
        if self.path.suffix.lower() in COMPRESSIONS:  # a truncated one cannot be read
            return
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() not in (b"\n", b"\r", b"\0"):  # the last one in UTF-16
                log.warning("%s ends in the middle of a line; if it is truncated, its last value is wrong", self.path)

    def _pieces(self) -> Iterator[bytes]:
        return text_pieces(self.path, self.options.get("encoding"), self.options.get("encoding_errors", "strict"))

    def _head(self) -> bytes:
        """The first piece, up to its last line end unless it is the whole text."""
        pieces = self._pieces()
        head, more = next(pieces), next(pieces, b"")
        return head[: head.rfind(b"\n") + 1] if more else head

    def _chunks(self) -> Iterator[bytes]:
        """Whole rows in chunks of about ``CHUNK`` bytes: pandas takes a millisecond more for each."""
        group, size = [], 0
        for chunk in self.records.cut(self._rows()):
            group.append(chunk)
            size += len(chunk)
            if size >= CHUNK:
                yield b"".join(group)
                group, size = [], 0
        if group:
            yield b"".join(group)

    def _rows(self) -> Iterator[bytes]:
        """The pieces from the first row on."""
        pieces = self._pieces()
        head, at, kept = next(pieces), 0, []
        for start, stop in self.dialect.skipped:
            kept.append(head[at:start])
            at = stop
        yield b"".join([*kept, head[at:]])
        yield from pieces

    def _parse(self, chunk: bytes, names: Sequence[str], fast: set[str]) -> dict[str, np.ndarray]:
        """Columns of a chunk as pandas takes them: the ``fast`` ones numbers if they are, the others texts, NaN if
        missing."""
        import pandas as pd

        places = {name: self._place[name] for name in names}
        usual = [*MISSING] if self.options.get("keep_default_na", True) else []
        missing = self.options.get("na_values", ())
        if isinstance(missing, Mapping):
            missing = {place: [*usual, *_list(missing.get(name, ()))] for name, place in places.items()}
        else:
            missing = [*usual, *_list(missing)]
        try:
            frame = pd.read_csv(
                _Bytes(chunk),
                sep=self.records.separator or r"\s+",
                header=None,
                names=range(self.records.fields),
                usecols=sorted(places.values()) if self.records.strict else None,
                dtype={place: object for name, place in places.items() if name not in fast},
                decimal=self.dialect.decimal,
                quotechar=self.records.quote,
                na_values=missing,
                keep_default_na=False,
                engine="c",
                low_memory=False,
                **{"skipinitialspace": True} | {key: self.options[key] for key in PASSED if key in self.options},
            )
        except TypeError as error:  # an option of another type
            raise UsageError(f"dataset.read: {' '.join(str(error).split())}") from error
        return {name: frame[place].to_numpy() for name, place in places.items()}

    def _columns(self, chunk: bytes, names: Sequence[str], row: int) -> Block:
        """Columns of a chunk, before which there are ``row`` rows, as they are in a block."""
        plain = Numerals(self.dialect.decimal)
        fast = {name for name in names if self.numerals.get(name) == plain}  # pandas is slower if told of float64
        columns = self._parse(chunk, names, fast)
        odd = [name for name in fast if columns[name].dtype.kind not in "iuf"]
        if odd:  # text among numbers, or numbers of too many digits for pandas
            columns |= self._parse(chunk, odd, set())
        numbers = fast - {*odd}
        return {
            name: values.astype(np.float64, copy=False) if name in numbers else self._convert(name, values, row)
            for name, values in columns.items()
        }

    def _convert(self, name: str, values: np.ndarray, row: int) -> np.ndarray:
        """A column as it is in a block, from texts in which a missing value is NaN. Raises UsageError for the first
        value that does not belong to it."""
        places, texts = self._distinct(values)
        known = texts.to_pylist()
        if name in self.numerals:
            fitting, kind = self.numerals[name].match(texts), "a number"
        elif self._kinds[name] == "boolean":
            fitting, kind = np.array([text in BOOLEANS for text in known], dtype=bool), "true or false"
        else:
            fitting, kind = np.ones(len(known), dtype=bool), "text"
        if not fitting.all():
            first = int((~np.append(fitting, True)[places]).argmax())
            text = known[places[first]]
            raise UsageError(
                f"column '{name}', row {row + first + 1} (the first is 1): '{text}' is not {kind}, unlike the rows"
                f" before it; correct it, or set dataset.read={{na_values: ['{text}']}} or"
                f" dataset.types={{{name}: category}}"
            )
        if name in self.numerals:
            return np.append(self.numerals[name].read(texts), np.nan)[places]
        if self._kinds[name] == "boolean":
            known = [BOOLEANS[text] for text in known]
        return np.array([*known, None], dtype=object)[places]

    def _distinct(self, values: np.ndarray):
        """For each value its place among the different texts, and these, a pyarrow array; -1: missing."""
        import pandas as pd
        import pyarrow as pa
        from pyarrow import compute

        places, texts = pd.factorize(values)
        trimmed = compute.utf8_trim_whitespace(pa.array(texts, pa.large_string()))
        if not trimmed.equals(pa.array(texts, pa.large_string())):  # some may be equal by now, or missing
            again, texts = pd.factorize(np.array([None if t in self.missing else t for t in trimmed.to_pylist()]))
            places, trimmed = np.append(again, -1)[places], pa.array(texts, pa.large_string())
        return places, trimmed

    def _find_kinds(self, text: set[str]) -> dict[str, Kind]:
        """The kinds of all columns, by the first chunk of rows; those in ``text`` hold text."""
        chunk = next(self.records.cut(self._rows()), None)
        if chunk is None:
            self.numerals = dict.fromkeys(self.names, Numerals(self.dialect.decimal))
            return dict.fromkeys(self.names, "number")
        kinds: dict[str, Kind] = {}
        zeros = LEADING_ZERO.search(chunk)
        candidate = set() if zeros else {*self.names} - text
        odd = []
        for name, values in self._parse(chunk, self.names, candidate).items():
            if name in candidate and values.dtype.kind in "iuf":
                kinds[name], self.numerals[name] = "number", Numerals(self.dialect.decimal)
            else:
                odd.append(name)
        for name, values in self._parse(chunk, odd, set()).items() if odd else ():
            kinds[name] = "text" if name in text else self._find_kind(name, self._distinct(values)[1])
        return kinds

    def _find_kind(self, name: str, texts) -> Kind:
        """What the different texts of a column (a pyarrow array) are; for numbers, how they are written is kept."""
        if len(texts) and all(value in BOOLEANS for value in texts[:7].to_pylist()):
            return "boolean"
        if has_leading_zero(texts):
            return "text"
        marks = self.options.get("thousands")
        forms = candidates(self.dialect.decimal) if marks is None else _with_thousands(self.dialect.decimal, marks)
        numerals = next((form for form in forms if form.match(texts[:9]).all() and form.match(texts).all()), None)
        if numerals is None:
            return "text"
        self.numerals[name] = numerals
        return "number"

    def _numeral_notes(self) -> list[str]:
        """One note for each way to write numbers that is not the plainest."""
        found: dict[Numerals, list[str]] = {}
        for name, numerals in self.numerals.items():
            if numerals != Numerals():
                found.setdefault(numerals, []).append(name)
        return [f"numbers with {numerals}: {join_names(names)}" for numerals, names in found.items()]


class _Bytes:
    """Bytes as a file that pandas reads without decoding them first."""

    def __init__(self, data: bytes):
        self.data = data

    def read(self, size: int = -1) -> bytes:
        data, self.data = self.data, b""
        return data

    def __iter__(self):
        raise NotImplementedError  # pandas asks only whether it is there


def _check(read: Mapping) -> dict:
    """The options by the names that pandas gives them. Raises UsageError for a wrong one."""
    check_options(read, (*OWN, *PASSED, *SYNONYMS), "text files", REFUSED)
    options = {SYNONYMS.get(name, name): value for name, value in read.items()}
    for name, example in EXAMPLES.items():
        value = options.get(name, "")
        if name in options and value is None:
            del options[name]
        elif not isinstance(value, str):
            raise UsageError(f"dataset.read.{name}={value}: must be text, such as '{example}'")
    if "sep" in options:
        separator = {"\\t": "\t", r"\s+": None, r"\\s+": None}.get(options["sep"], options["sep"])
        if separator is not None and (len(separator) != 1 or not separator.isascii()):
            raise UsageError(f"dataset.read.sep={separator}: must be one character, or '\\s+' for runs of blanks")
        options["sep"] = separator
    for name in ("decimal", "thousands", "quotechar"):
        if len(options.get(name, ".")) != 1:
            raise UsageError(f"dataset.read.{name}={options[name]}: must be one character")
    rows = options.get("nrows", 1)
    if rows is not None and (not isinstance(rows, int) or rows < 1):
        raise UsageError(f"dataset.read.nrows={rows}: must be a number of rows")
    return options


def _list(marks) -> list:
    """``na_values``, which may be one mark."""
    return list(marks) if isinstance(marks, list | tuple | set) else [marks]


def _with_thousands(decimal: str, mark: str) -> list[Numerals]:
    return [Numerals(decimal, marks, percent) for marks in ((), (mark,)) for percent in (False, True)]
