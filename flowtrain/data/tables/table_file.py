"""A user's table in a csv, npy or parquet file: its columns from the header alone, its rows in blocks."""

from __future__ import annotations

import csv
import difflib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger(__name__)

BLOCK = 2**16  # rows of a block
CSV_BLOCK = 2**24  # bytes of a block of text
UNNAMED = ("", "Unnamed: 0", "__index_level_0__")  # names that pandas gives to an index in the file

Block = dict[str, np.ndarray]  # name -> float64 with NaN for missing values, or texts with None for missing values


class Csv:
    """A csv file. Its separator is whichever of comma, semicolon, tab and bar is most frequent in the first line, which
    holds the names."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, encoding="utf-8-sig", newline="") as file:
            line = file.readline()
        if line.count('"') % 2:
            raise UsageError(f"{path}: the name of a column holds a line break; rename it")
        self.delimiter = max(",;\t|", key=re.sub('"[^"]*"', "", line).count)
        self.names = next(csv.reader([line], delimiter=self.delimiter), [])
        if not self.names or all(is_number(name) for name in self.names):
            raise UsageError(f"{path} has no first line that names its columns")
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() not in (b"\n", b"\r"):
                log.warning("%s ends in the middle of a line; if it is truncated, its last value is wrong", path)

    def text_columns(self, names: Sequence[str]) -> set[str]:
        """Which of the columns hold text, by their first block of rows."""
        return {name for name, kind in self._kinds(names).items() if str(kind) != "double"}

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        kinds = self._kinds(names)
        try:
            yield from self._blocks(names, kinds)
        except ValueError:
            for _ in self._blocks(names, kinds, threads=False):  # raises again, with the number of the row
                pass
            raise

    def _kinds(self, names: Sequence[str]) -> dict:
        from pyarrow import types

        with self._reader(names, {}) as reader:
            return {
                field.name: field.type if types.is_boolean(field.type) else _arrow_type(self.path, field)
                for field in reader.schema
            }

    def _blocks(self, names: Sequence[str], kinds: dict, threads: bool = True) -> Iterator[Block]:
        try:
            with self._reader(names, kinds, threads) as reader:
                for batch in reader:
                    yield _to_block(self.path, batch, names)
        except ValueError as error:
            where = re.search(r"CSV column #(\d+): Row #(\d+): .*invalid value '(.*)'", str(error))
            if where is None:
                raise
            name, row = self.names[int(where[1])], int(where[2]) - 1  # without the line of names
            raise UsageError(
                f"column '{name}', row {row}: '{where[3]}' is not a number, unlike the rows before it"
            ) from error

    def _reader(self, names, kinds, threads=True):
        from pyarrow import csv as arrow

        return arrow.open_csv(
            self.path,
            arrow.ReadOptions(block_size=CSV_BLOCK, use_threads=threads),
            arrow.ParseOptions(delimiter=self.delimiter),
            arrow.ConvertOptions(include_columns=list(names), column_types=kinds, strings_can_be_null=True),
        )


class Parquet:
    def __init__(self, path: Path):
        from pyarrow import parquet

        self.path = path
        self.schema = parquet.read_schema(path)
        self.names = self.schema.names

    def text_columns(self, names: Sequence[str]) -> set[str]:
        return {name for name in names if str(_arrow_type(self.path, self.schema.field(name))) != "double"}

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        from pyarrow import parquet

        with parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(BLOCK, columns=list(names)):
                yield _to_block(self.path, batch, names)


class Npy:
    """An array of numbers (N, D) with columns c0, c1, …."""

    def __init__(self, path: Path):
        self.path, self.rows = path, Array(path)
        if self.rows.ndim != 2 or self.rows.dtype.kind not in "fiub":
            raise UsageError(f"{path} holds {self.rows.dtype} {list(self.rows.shape)}: must be numbers (rows, columns)")
        self.names = [f"c{i}" for i in range(self.rows.shape[1])]

    def text_columns(self, names: Sequence[str]) -> set[str]:
        return set()

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        places = [self.names.index(name) for name in names]
        for start in range(0, len(self.rows), BLOCK):
            part = self.rows[start : start + BLOCK]
            with np.errstate(invalid="ignore"):  # a signalling NaN, which the caller refuses
                block = {name: part[:, place].astype(np.float64) for name, place in zip(names, places, strict=True)}
            yield block


class Array:
    """The array in an .npy file, of which ``array[start:stop]`` reads slices. It is not mapped into memory, since that
    kills the process without a message when another process truncates the file.

    Raises:
        FlowtrainError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        npy = np.lib.format
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        try:
            # a damaged header may cause warnings
            with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
                self.shape, is_fortran, self.dtype = readers[npy.read_magic(file)](file)
                self.start = file.tell()
            if self.dtype.hasobject:
                raise ValueError("it holds objects")
        except Exception as error:  # numpy raises many kinds for a damaged header
            raise FlowtrainError(f"cannot read {path}: it is not an .npy array of numbers") from error
        self.ndim = len(self.shape)
        size, expected = path.stat().st_size, self.start + self.dtype.itemsize * math.prod(self.shape)
        if size < expected:
            raise FlowtrainError(f"cannot read {path}: it has {size:,} bytes instead of {expected:,}")
        self.whole = np.load(path, allow_pickle=False) if is_fortran and self.ndim > 1 else None  # stored by columns

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        if self.whole is not None:
            return self.whole[rows]
        first, stop, _ = rows.indices(len(self))
        each = math.prod(self.shape[1:])
        with open(self.path, "rb") as file:
            file.seek(self.start + self.dtype.itemsize * each * first)
            found = np.fromfile(file, self.dtype, each * (stop - first))
        if len(found) < each * (stop - first):
            row = first + len(found) // each + 1
            raise FlowtrainError(f"cannot read {self.path} from row {row} on: the file is truncated")
        return found.reshape(-1, *self.shape[1:]) if each else np.empty((stop - first, *self.shape[1:]), self.dtype)


READERS = {".csv": Csv, ".npy": Npy, ".parquet": Parquet}


class TableFile:
    """The table at ``path``.

    Raises:
        UsageError: it is not a table.
        FlowtrainError: it is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        kind = READERS.get(self.path.suffix.lower())
        if kind is None:
            raise UsageError(f"dataset.path={path}: must end in {', '.join(READERS)}")
        if not self.path.is_file():
            raise UsageError(f"dataset.path={path}: no such file")
        with _name_file_in_errors(self.path):
            self._source = kind(self.path)
        self.names: list[str] = self._source.names

    def choose(self, columns: Sequence | None, context: Sequence | None) -> tuple[list[str], list[str]]:
        """The names of the columns to model (``columns``; None: all that are not in ``context``) and of the context."""
        context = self.find_columns("context", context or [])
        if columns is None:
            columns = [name for name in self.names if name not in context]
            unnamed = [name for name in columns if name in UNNAMED]
            if unnamed:
                number = self.names.index(unnamed[0]) + 1
                raise UsageError(
                    f"{self.path}: column {number} has no name and may be an index; choose dataset.columns=[…]"
                )
        columns = [name for name in self.find_columns("columns", columns) if name not in context]
        if not columns:
            raise UsageError("dataset.columns: no column is left to model")
        return columns, context

    def find_columns(self, key: str, chosen: Sequence) -> list[str]:
        """The names of the ``chosen`` columns, which may be numbers for an array. Raises UsageError, naming
        ``dataset.key``, for a column that is absent or not unique."""
        is_array = isinstance(self._source, Npy)
        chosen = [f"c{item}" if is_array and isinstance(item, int) else str(item) for item in chosen]
        for name in chosen:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"there are {_join_names(self.names)}"
                raise UsageError(f"dataset.{key}: {self.path} has no column '{name}'; {hint}")
            if self.names.count(name) > 1:
                raise UsageError(f"dataset.{key}: {self.path} has two columns '{name}'")
            if chosen.count(name) > 1:
                raise UsageError(f"dataset.{key}: '{name}' is named twice")
        return chosen

    def kinds(self, names: Sequence[str]) -> dict[str, str]:
        """What each of the columns holds: "number" or "text"."""
        with _name_file_in_errors(self.path):
            texts = self._source.text_columns(names)
        return {name: "text" if name in texts else "number" for name in names}

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        """Yield the rows in order: numbers as float64, NaN if missing; text as objects, None if missing."""
        with _name_file_in_errors(self.path):
            yield from self._source.blocks(names)


def missing_value_error(name: str, row: int) -> UsageError:
    """The error to raise for the value of a column in a row, counted from 1."""
    return UsageError(f"column '{name}', row {row} (the first is 1): its value is missing or not finite")


@contextmanager
def refuse_changes(path: Path):
    """Raise FlowtrainError at the end of this block if the file has changed, whatever else was raised."""
    before = _version(path)
    try:
        yield
    finally:
        if _version(path) != before:
            raise FlowtrainError(f"{path} has changed while it was read")


def _version(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _name_file_in_errors(path: Path):
    """Turn what a library raises inside this block into one line that names the file."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{path.suffix} files need more packages: pip install 'flowtrain[tables]'") from error
    except FlowtrainError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not in UTF-8: convert it") from error
    except Exception as error:  # libraries raise many kinds for a damaged file
        raise FlowtrainError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _arrow_type(path: Path, field):
    """The pyarrow type in which a column is read: string (also for booleans) or float64. Raises UsageError if the
    column is neither."""
    import pyarrow as pa
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    if types.is_null(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return pa.float64()
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_boolean(kind):
        return pa.string()
    raise UsageError(f"{path}: column '{field.name}' holds {kind}: write it as numbers or text, or leave it out")


def _to_block(path: Path, batch, names: Sequence[str]) -> Block:
    out = {}
    for name in names:
        column = batch.column(name).cast(_arrow_type(path, batch.schema.field(name)), safe=False)
        out[name] = column.to_numpy(zero_copy_only=False)
    return out


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _join_names(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")
