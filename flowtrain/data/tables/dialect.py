"""The form of a delimited text, found in its head: separator, comments, names, index, decimal mark."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowtrain.data.tables.block import INDEX_NAMES, check_width, counts, index_note, name_columns
from flowtrain.data.tables.numerals import EXPONENT, MISSING, find_decimal
from flowtrain.data.tables.text_stream import Records, mask_quoted
from flowtrain.errors import UsageError

SEPARATORS = ("\t", ";", "|", ",", None)  # where several would do, the first
COMMENTS = ("#", "%", "//")
LINES = 2000  # in which the first row must be
SAMPLE = 1000  # lines that show the form
NUMBER = re.compile(rf"[-+]?[\d.,'’ \u00a0\u202f]*\d[.,]?{EXPONENT}\s?%?|[-+]?inf(?:inity)?", re.IGNORECASE)


@dataclass(frozen=True)
class Dialect:
    """The form of a delimited text.

    Attributes:
        records: how it is cut into rows.
        names: of its columns.
        places: the field of each column: there may be fields for an index, or behind a trailing separator.
        skipped: ranges of bytes that are no rows, in order: what comes before the first row, and lines to be skipped.
        decimal: the mark of decimals.
        notes: see :class:`~flowtrain.data.tables.block.Reader`.
    """

    records: Records
    names: list[str]
    places: list[int]
    skipped: list[tuple[int, int]]
    decimal: str
    notes: list[str]


def find_dialect(head: bytes, options: Mapping) -> Dialect:
    """The form of the text that begins with ``head``, in whole lines, as far as ``options`` do not set it.

    Options are those of ``pandas.read_csv``: sep, comment, header, names, skiprows, quotechar, decimal.

    Raises:
        UsageError: the head is no table, or an option does not fit it.
    """
    head.decode()  # raises for what is not UTF-8
    quote, notes, separator = options.get("quotechar", '"'), [], options.get("sep", "")
    announced = re.match(rb'"?sep=(.)"?\n', head)  # as Excel writes it
    skiprows = options.get("skiprows", 1 if announced else 0)
    if announced and not separator:
        separator = announced[1].decode()
    lines = _skip(_lines(head, quote, separator or ",;|\t "), skiprows)[0]
    comment = options.get("comment") or _comment_mark(lines)
    if not _rows(lines, comment):
        raise UsageError("it has no rows" if head.strip() else "it is empty")
    if separator == "":
        separator = _separator(_rows(lines, comment)[:SAMPLE])
    lines, skipped = _skip(_lines(head, quote, separator or " \t"), skiprows)
    rows = _rows(lines, comment)
    records = Records(separator, 0, quote, comment, inline="comment" in options)
    header = options.get("header", "find")
    if isinstance(header, int) and not isinstance(header, bool):
        if not 0 <= header < len(rows):
            raise UsageError(f"dataset.read.header={header}: there are {len(rows)} lines")
        rows = rows[header:]
    elif header not in ("find", "infer", None):
        raise UsageError(f"dataset.read.header={header}: must be the number of a line, from 0, or null for none")
    widths = Counter(records.count(line.text) for line in rows[1:SAMPLE] or rows)
    records = replace(records, fields=max(widths, key=widths.get))
    check_width(records.fields)
    split = _Splitter(separator, quote)
    sample = [split(line.source(head)) for line in rows[:SAMPLE]]
    first, body = sample[0], [row for row in sample[1:] if len(row) == records.fields]
    commented = _commented_names(head, lines, rows[0], comment, records.fields, split)
    if header in ("find", "infer"):
        named = _names_columns(first, body)
        header = 0 if named or named is None and not commented else None
    if header is None:
        names, body = commented, [row for row in sample if len(row) == records.fields]
        if commented:
            notes.append("the names of the columns are those of the comment before the first row")
    else:
        names = first
        if mask_quoted(head[rows[0].start : rows[0].stop], quote, separator or " \t")[1] is not None:
            raise UsageError("a quote in the line that names its columns is not closed")
        rows = rows[1:]
    if comment:
        where = "what follows" if records.inline else "lines that start with"
        notes.append(f"{where} {comment}: left out as comments")
    places, names = _places(names, body, records, notes)
    if names is None:
        names = [f"c{place}" for place in range(len(places))]
        if "names" not in options:
            last = f" … {names[-1]}" if len(names) > 1 else ""
            notes.append(f"no line names the columns, which are called {names[0]}{last}")
    if "names" in options:
        if not isinstance(options["names"], Sequence) or isinstance(options["names"], str):
            raise UsageError(f"dataset.read.names={options['names']}: must be a list of names")
        if len(options["names"]) != len(places):
            raise UsageError(f"dataset.read.names: {len(options['names'])} names for {len(places)} columns")
        names = options["names"]
    names, changes = name_columns(names)
    start = rows[0].start if rows else len(head)
    return Dialect(
        records,
        names,
        places,
        [(0, start), *((line.start, line.stop) for line in skipped if line.start >= start)],
        options.get("decimal") or find_decimal((text for row in body for text in row), separator or " "),
        notes + changes,
    )


@dataclass(frozen=True)
class _Line:
    """A line of the head, with a letter for each in quotes; ``stop`` is behind its end."""

    start: int
    stop: int
    text: bytes

    def source(self, head: bytes) -> str:
        return head[self.start : self.stop].decode().rstrip("\n")


def _lines(head: bytes, quote: str, separators: str) -> list[_Line]:
    """The first lines, where a line end in quotes is none."""
    plain = mask_quoted(head, quote, separators)[0]
    ends = np.flatnonzero(plain == 10)[:LINES].tolist()
    if len(ends) < LINES and len(head) and plain[-1] != 10:
        ends.append(len(head))
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [_Line(start, end + 1, plain[start:end].tobytes()) for start, end in zip(starts, ends)]


def _skip(lines: list[_Line], skiprows) -> tuple[list[_Line], list[_Line]]:
    """The lines that are left, and those that are skipped."""
    numbers = range(skiprows) if isinstance(skiprows, int) and not isinstance(skiprows, bool) else skiprows
    if not isinstance(numbers, Sequence) or not all(isinstance(number, int) for number in numbers):
        raise UsageError(
            f"dataset.read.skiprows={skiprows}: must be a number of lines, or a list of line numbers from 0"
        )
    if len(numbers) and not 0 <= min(numbers) <= max(numbers) < len(lines):
        raise UsageError(f"dataset.read.skiprows={skiprows}: only the first {len(lines)} lines can be skipped")
    numbers = set(numbers)
    return (
        [line for number, line in enumerate(lines) if number not in numbers],
        [line for number, line in enumerate(lines) if number in numbers],
    )


def _rows(lines: list[_Line], comment: str | None) -> list[_Line]:
    """The lines that are neither blank nor a comment."""
    mark = comment.encode() if comment else None
    rows = (line for line in lines if line.text.strip(b" "))
    return [line for line in rows if not mark or not _is_comment(line, mark)]


def _is_comment(line: _Line, mark: bytes) -> bool:
    text = line.text.lstrip(b" ")
    return text.startswith(mark) and not re.match(rb"#N/?A\b", text)


def _comment_mark(lines: list[_Line]) -> str | None:
    """The mark before comments: first lines start with it and others do not; or a few lines do where all others start
    with a number."""
    lines = [line for line in lines if line.text.strip()]
    for comment in COMMENTS:
        are = [_is_comment(line, comment.encode()) for line in lines]
        if not any(are) or all(are):
            continue
        body = are[are.index(False) :]
        others = [line.text for line, is_comment in zip(lines, are) if not is_comment][1:]
        begin_with_numbers = others and all(re.match(rb" *[-+]?[\d.]", text) for text in others)
        if sum(body) < len(body) / 2 and (are[0] and not any(body) or begin_with_numbers):
            return comment
    return None


def _separator(lines: list[_Line]) -> str | None:
    """What separates the fields: it occurs equally often in every line, also in the first but for the name of an index,
    and leaves the most numbers."""
    best, found = (0.0, False, -1.0), ","
    texts = [line.text for line in lines[:200]]
    for separator in SEPARATORS:
        records = Records(separator, 0)
        widths = [records.count(text) for text in texts]
        common = Counter(widths[1:] or widths).most_common(1)[0][0]
        if common < 2:
            continue
        share = sum(width == common for width in widths) / len(widths)
        split = _Splitter(separator, '"')
        fields = [field for text in texts[:50] for field in split(text.decode(errors="replace"))[:1000]]
        numeric = sum(map(_is_number, fields)) / len(fields)
        if separator is None and not numeric:  # words
            continue
        fit = (min(share, 0.9), widths[0] in (common, common - 1), numeric)
        if fit > best:
            best, found = fit, separator
    decimals = all(re.fullmatch(rb" *[-+]?\d+,\d+ *", text) for text in texts[1:])
    if found == "," and len(texts) > 1 and b"," not in texts[0] and decimals:
        return ";"  # one column of decimals
    return found


class _Splitter:
    """Split a row into its fields, without blanks around them."""

    def __init__(self, separator: str | None, quote: str):
        self.separator, self.quote = separator, quote

    def __call__(self, text: str) -> list[str]:
        if self.separator is None:
            fields = re.findall(rf"{self.quote}[^{self.quote}]*{self.quote}|\S+", text)
            return [field.strip(self.quote) for field in fields]
        try:
            fields = next(csv.reader([text], delimiter=self.separator, quotechar=self.quote, skipinitialspace=True), [])
        except csv.Error as error:
            raise UsageError(f"a line cannot be split: {error}") from error
        return [field.strip() for field in fields]


def _is_number(text: str) -> bool:
    return text in MISSING or NUMBER.fullmatch(text) is not None


def _names_columns(first: list[str], body: list[list[str]]) -> bool | None:
    """Whether the first row names the columns: it has text over numbers. None: it may, since all is text."""
    if not body:
        return not any(NUMBER.fullmatch(text) for text in first)
    width = len(body[0])
    if len(first) != width:  # a row of another length is refused as one
        return not any(NUMBER.fullmatch(text) for text in first)
    against = False
    for name, values in zip(first, zip(*body)):
        if all(map(_is_number, values)):
            if not _is_number(name):
                return True
            against = against or name not in MISSING
        else:
            against = against or (name in values and name not in MISSING)
    return False if against else None


def _commented_names(head, lines, first, comment, fields, split) -> list[str] | None:
    """The names in the comment before the first row, if there are as many as fields."""
    before = [line for line in lines if line.start < first.start and line.text.strip()]
    if not comment or not before or not _is_comment(before[-1], comment.encode()):
        return None
    text = before[-1].source(head).strip().lstrip(comment).strip()
    for names in (split(text), text.split()):
        if len(names) == fields and not any(map(_is_number, names)):
            return names
    return None


def _places(names: list[str] | None, body: list[list[str]], records: Records, notes: list[str]):
    """The fields that are columns, and their names: not the empty ones behind a trailing separator, not an index."""
    fields, places = records.fields, [*range(records.fields)]
    trailing = records.separator is not None and fields > 1 and not any(row[-1] for row in body)
    if names is None:
        return (places[:-1] if trailing and body else places), None
    if len(names) == fields + 1 and not names[-1]:
        names = names[:-1]
    if trailing and (len(names) == fields - 1 or not names[-1]):
        width = fields - 1
        while width > 1 and not names[width - 1] and not any(row[width - 1] for row in body):
            width -= 1
        places, names = places[:width], names[:width]
    elif len(names) == fields - 1:
        notes.append("the first column has no name and is left out: it names the rows")
        return places[1:], names
    elif len(names) != fields:
        raise UsageError(
            f"its first line has {_fields(len(names))}, the others {fields}; if it does not name the columns:"
            " dataset.read={skiprows: 1}"
        )
    if names[0] in INDEX_NAMES and len(names) > 1 and _counts([row[0] for row in body]):
        notes.append(index_note(names[0]))
        return places[1:], names[1:]
    return places, names


def _fields(number: int) -> str:
    return "1 field" if number == 1 else f"{number} fields"


def _counts(texts: Sequence[str]) -> bool:
    return all(text.isdecimal() for text in texts) and counts(np.array(texts, dtype=np.float64))
