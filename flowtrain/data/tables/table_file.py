"""A user's table in a file of any of the formats that are read: its columns from its head, its rows in blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flowtrain.data.tables.arrays import Hdf5, Npy, Npz
from flowtrain.data.tables.arrow_files import ArrowFile, Parquet
from flowtrain.data.tables.block import Block, Kind, Reader, join_names, nearest
from flowtrain.data.tables.excel import Excel
from flowtrain.data.tables.json_lines import JsonLines
from flowtrain.data.tables.text_file import TextFile
from flowtrain.data.tables.text_stream import COMPRESSIONS
from flowtrain.errors import FlowtrainError, UsageError

READERS: dict[str, type[Reader]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".dat", ".data"), TextFile),
    ".parquet": Parquet,
    **dict.fromkeys((".feather", ".arrow"), ArrowFile),
    ".npy": Npy,
    ".npz": Npz,
    **dict.fromkeys((".h5", ".hdf5"), Hdf5),
    **dict.fromkeys((".jsonl", ".ndjson"), JsonLines),
    ".xlsx": Excel,
}
HINTS = {
    ".xls": "save it as .xlsx",
    ".json": "write an object in each line of a .jsonl",
    ".zarr": "dataset=arrays reads it",
    ".zip": "unpack it",
    ".tar": "unpack it",
}
COMPRESSED = (TextFile, JsonLines)  # what may also be compressed
KEYED = (Npz, Hdf5)  # what may hold several tables


def find_reader(path: Path) -> type[Reader] | None:
    """The reader of a file with such a name, which may end in two suffixes as .csv.gz does; None if there is none."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in COMPRESSIONS:
        return READERS[inner] if READERS.get(inner) in COMPRESSED else None
    return READERS.get(last)


class TableFile:
    """The table at ``path``.

    Args:
        key: the name of an array in an .npz or .h5 file that holds several.
        read: options for the reader: for text and Excel those of ``pandas.read_csv``, and ``sheet_name``, for JSON
            those of ``read_json``, for parquet those of ``pyarrow.parquet.ParquetFile``.
        text: names of columns that hold text, whatever they look like.

    Attributes:
        names: of its columns: unique, without blanks around them.
        notes: one line for each decision that a user should know: a file without names, an index that is left out, ….

    Raises:
        UsageError: it is not a table, or the arguments do not fit it.
        FlowtrainError: it is damaged.
    """

    def __init__(
        self, path: str | Path, *, key: str | None = None, read: Mapping | None = None, text: Sequence[str] = ()
    ):
        self.path = Path(os.path.expanduser(path))
        reader = Parquet if self.path.is_dir() else find_reader(self.path)
        if reader is None:
            hint = HINTS.get(self.path.suffix.lower())
            packed = f"text and JSON may also be compressed: {', '.join(COMPRESSIONS)}"
            raise UsageError(
                f"dataset.path={path}: {f'{hint}; ' if hint else ''}must end in {', '.join(READERS)}, or be a folder of"
                f" parquet parts; {packed}"
            )
        if not self.path.exists():
            raise UsageError(f"dataset.path={path}: no such file")
        if key is not None and reader not in KEYED:
            raise UsageError(f"dataset.key={key}: {path} holds one table; only .npz and .h5 files have keys")
        with _name_file_in_errors(self.path):
            keys = {"key": key} if reader in KEYED else {}
            self._reader = reader(self.path, read or {}, text, **keys)
        self.names, self.notes = self._reader.names, self._reader.notes

    def choose(
        self, columns: Sequence | None, context: Sequence | None, weights: str | int | None = None
    ) -> tuple[list[str], list[str]]:
        """The names of the columns to model (``columns``; None: all others) and of the context. The column of
        ``weights`` is in neither."""
        context = self.find_columns("context", context or [])
        weights = [] if weights is None else self.find_columns("weights", [weights])
        if clash := [name for name in weights if name in context]:
            raise UsageError(f"dataset.weights: '{clash[0]}' is in dataset.context too; choose one")
        columns = self.names if columns is None else self.find_columns("columns", columns)
        columns = [name for name in columns if name not in (*context, *weights)]
        if not columns:
            raise UsageError("dataset.columns: no column is left to model")
        return columns, context

    def find_columns(self, key: str | None, chosen: Sequence) -> list[str]:
        """The names of the ``chosen`` columns, which may be numbers where the columns are called c0, c1, …. Raises
        UsageError, naming ``dataset.key`` if the user typed them, for a column that is absent or named twice."""
        typed = f"dataset.{key}: " if key else ""
        numbered = "c0" in self.names
        chosen = [f"c{item}" if numbered and isinstance(item, int) else str(item) for item in chosen]
        for name in chosen:
            if name not in self.names:
                near = nearest(name, self.names)
                hint = f"did you mean '{near}'?" if near else f"there are {join_names(self.names)}"
                raise UsageError(f"{typed}{self.path} has no column '{name}'; {hint}")
            if chosen.count(name) > 1:
                raise UsageError(f"{typed}'{name}' is named twice")
        return chosen

    def kinds(self, names: Sequence[str]) -> dict[str, Kind]:
        """What each of the columns holds: "number", "text", "time" or "boolean"."""
        with _name_file_in_errors(self.path):
            return self._reader.kinds(names)

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        """Yield the rows in order: numbers as float64, NaN if missing; text as objects, None if missing; times as
        datetime64[us], NaT if missing; booleans as "true" and "false", None if missing."""
        with _name_file_in_errors(self.path):
            yield from self._reader.blocks(names)


def missing_value_error(name: str, row: int) -> UsageError:
    """The error to raise for the value of a column in a row, counted from 1."""
    return UsageError(f"column '{name}', row {row} (the first is 1): its value is missing or not finite")


@contextmanager
def name_file(path: Path):
    """Begin the line of a UsageError with the file, unless it names the file or a key."""
    try:
        yield
    except UsageError as error:
        if str(path) in str(error) or str(error).startswith("dataset."):
            raise
        raise UsageError(f"{path}: {error}") from error


@contextmanager
def refuse_changes(path: Path):
    """Raise FlowtrainError at the end of this block if the file has changed, whatever else was raised."""
    before = _version(path)
    try:
        yield
    finally:
        if _version(path) != before:
            raise FlowtrainError(f"{path} has changed while it was read")


def _version(path: Path) -> list[tuple] | None:
    """Name, size and time of change of a file, or of all files in a folder."""
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return [(file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    except OSError:
        return None


@contextmanager
def _name_file_in_errors(path: Path):
    """Turn what is raised inside this block into one line that names the file."""
    try:
        with name_file(path):
            yield
    except ModuleNotFoundError as error:
        extra = "excel" if error.name == "openpyxl" else "tables"
        raise UsageError(f"{path.suffix} files need more packages: pip install 'flowtrain[{extra}]'") from error
    except ImportError as error:  # as pandas says that openpyxl is lacking
        raise UsageError(f"{path.suffix} files need more packages: pip install 'flowtrain[tables,excel]'") from error
    except FlowtrainError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not in {error.encoding.upper()}: name its encoding with dataset.read={{encoding: latin-1}}"
        ) from error
    except Exception as error:  # libraries raise many kinds for a damaged file
        why = "".join(filter(str.isprintable, " ".join(str(error).split())))[:300] or type(error).__name__
        raise FlowtrainError(f"cannot read {path}: {why}") from error


def is_number(value) -> bool:
    """Whether ``value``, such as a text, can be converted to a number."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
