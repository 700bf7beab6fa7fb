"""The text of a file: decompressed, in UTF-8, with lines that end in a line feed, in pieces; then in whole records."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flowtrain.errors import UsageError

HEAD = 2**20  # bytes from which the form of a text is found
HEAD_LINES = 20  # or more, for so many lines
PIECE = 2**20  # bytes of the other pieces
LONGEST = 2**26  # bytes of a line
MARKS = {  # byte-order marks, the longer ones first
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def _open_zstandard(path: Path) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


COMPRESSIONS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstandard}


def open_file(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed according to its suffix."""
    return COMPRESSIONS.get(path.suffix.lower(), lambda path: open(path, "rb"))(path)


def text_pieces(path: Path, encoding: str | None = None, errors: str = "strict") -> Iterator[bytes]:
    """Yield the text in UTF-8. The first piece, which may be empty, has ``HEAD`` bytes or ``HEAD_LINES`` lines.

    Args:
        encoding: None: what a byte-order mark says, or else UTF-8, which is not checked here.

    Raises:
        UsageError: the encoding is unknown, or the text holds NUL bytes or a line that is too long.
    """
    with open_file(path) as file:
        start, final = file.read(4), False
        found = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
        decoder = _decoder(encoding or found, errors)
        text = bytearray()
        while not final and (len(text) < HEAD or len(text) < LONGEST and _lines(text) < HEAD_LINES):
            more = file.read(HEAD)
            final = not more
            text += decoder(start + more, final)
            start = b""
        if len(text) >= LONGEST and _lines(text) < 2:
            raise UsageError(f"{path} has a line of more than {LONGEST / 2**20:.0f} MB: it is no table")
        piece, carry = bytes(text).removeprefix(codecs.BOM_UTF8), b""
        while True:
            piece = carry + piece
            carry = b"\r" if piece.endswith(b"\r") and not final else b""  # perhaps the first half of a line's end
            piece = piece[: len(piece) - len(carry)]
            if b"\0" in piece:
                raise UsageError(
                    f"{path} holds NUL bytes: it is no text, or its encoding must be named:"
                    " dataset.read={encoding: utf-16}"
                )
            if b"\r" in piece:
                piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            yield piece
            if final:
                return
            more = file.read(PIECE)
            final = not more
            piece = decoder(more, final)


def _decoder(encoding: str, errors: str) -> Callable[[bytes, bool], bytes]:
    """Turn pieces of bytes into UTF-8."""
    try:
        if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig") and errors == "strict":
            return lambda data, final: data
        decode = codecs.getincrementaldecoder(encoding)(errors).decode
    except (LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"dataset.read.encoding={encoding}: there is no such encoding; try latin-1 or cp1252") from (
            error
        )
    return lambda data, final: decode(data, final).encode("utf-8", "surrogatepass")


def _lines(text: bytearray) -> int:
    return max(text.count(b"\n"), text.count(b"\r"))


@dataclass(frozen=True)
class Records:
    """How the text of a table is cut into rows.

    Attributes:
        separator: one character of ASCII; None: runs of blanks.
        fields: in each row.
        quote: around fields that hold separators, quotes or line ends.
        comment: lines that start with it are left out; None: there are none.
        inline: whether the rest of a line that holds it is a comment, too.
        strict: whether quotes are written twice inside quotes and rows of another length are refused here; otherwise a
            record is a line.
    """

    separator: str | None
    fields: int
    quote: str = '"'
    comment: str | None = None
    inline: bool = False
    strict: bool = True

    def cut(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Join pieces to chunks of whole rows.

        Raises:
            UsageError: a row has another number of fields, or a quote is not closed.
        """
        rest, row = b"", 0
        for piece in _and_end(pieces):
            data = rest + piece if piece or not rest else rest + b"\n"
            if len(rest) > LONGEST:
                size = f"{LONGEST / 2**20:.0f} MB"
                raise UsageError(f"row {row + 1} (the first is 1) has more than {size}: is a quote not closed?")
            chunk = data[: data.rfind(b"\n") + 1]
            if self.strict:
                plain, opened = self._mask(chunk)
                if opened is not None and not piece:
                    row += self._check(plain[: chunk.rfind(b"\n", 0, opened) + 1], row)
                    raise UsageError(f"row {row + 1} (the first is 1): a quote is not closed")
                if opened is not None:
                    chunk = chunk[: chunk.rfind(b"\n", 0, opened) + 1]
            rest = data[len(chunk) :]
            if self.comment and self.comment.encode() in chunk:
                chunk = self._comments.sub(rb"\1", chunk)
                plain = self._mask(chunk)[0]
            if self.strict:
                row += self._check(plain[: len(chunk)], row)
            if chunk and not chunk.isspace():
                yield chunk

    @cached_property
    def _comments(self) -> re.Pattern:
        mark, quote = re.escape(self.comment.encode()), re.escape(self.quote.encode())
        if self.inline:
            return re.compile(rb"(%b[^%b]*%b)|[ \t]*%b[^\n]*" % (quote, quote, quote, mark))
        return re.compile(rb"(?m)^() *%b(?!N/?A\b)[^\n]*\n" % mark)  # #N/A is a missing value

    def _mask(self, data: bytes) -> tuple[np.ndarray, int | None]:
        return mask_quoted(data, self.quote, " \t" if self.separator is None else self.separator)

    def _check(self, plain: np.ndarray, before: int) -> int:
        """The number of rows, all of the right length: a few passes over the bytes, no loop over good rows."""
        ends = np.flatnonzero(plain == 10)
        if self.separator is None:
            full = plain > 32
            marks, each = np.flatnonzero(full[1:] & ~full[:-1]) + 1, self.fields
            marks = np.concatenate([[0], marks]) if full[:1].any() else marks
        else:
            marks, each = np.flatnonzero(plain == ord(self.separator)), self.fields - 1
        if len(marks) == each * len(ends):
            if each == 0 or (marks[each - 1 :: each] < ends).all() and (marks[each::each] > ends[:-1]).all():
                return len(ends)
        row = before
        for line in plain.tobytes().split(b"\n"):
            found = self.count(line)
            row += found > 0
            if found not in (0, self.fields):
                hint = "; dataset.read={skiprows: N} leaves out N lines before a table" if row == 1 else ""
                raise UsageError(
                    f"row {row} (the first is 1) has {found} field{'s' if found > 1 else ''}, not {self.fields}{hint}"
                )
        return row - before

    def count(self, line: bytes) -> int:
        """The fields of a line without quotes, 0 of a blank line."""
        if not line.strip(b" ") or self.separator is None:
            return len(line.split())
        return line.count(self.separator.encode()) + 1


def mask_quoted(data: bytes, quote: str, separators: str) -> tuple[np.ndarray, int | None]:
    """The bytes with a letter in place of each in quotes, and where a quote opens that is not closed. Quotes open
    at the start of a field, after blanks or not; elsewhere they are as any other character."""
    array, mark = np.frombuffer(data, np.uint8), ord(quote)
    is_quote = array == mark
    if not is_quote.any():
        return array, None
    inside = np.cumsum(is_quote, dtype=np.uint8) & 1 == 1
    opening = np.flatnonzero(is_quote & inside)
    before = array[np.maximum(opening - 1, 0)]
    if np.isin(before, [mark, 10, *separators.encode()]).all():
        return np.where(inside | is_quote, ord("q"), array), int(opening[-1]) if inside[-1] else None
    q, start = re.escape(quote.encode()), re.escape(separators.encode())
    field = re.compile(rb"(?:\A|(?<=[\n%b])) *%b[^%b]*(?:%b%b[^%b]*)*(%b|\Z)" % (start, q, q, q, q, q, q))
    plain, opened = bytearray(data), None
    for match in field.finditer(data):
        plain[match.start() : match.end()] = b"q" * len(match[0])
        opened = None if match[1] else match.start()
    return np.frombuffer(plain, np.uint8), opened


def _and_end(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces that are not empty, then an empty one."""
    yield from filter(None, pieces)
    yield b""
