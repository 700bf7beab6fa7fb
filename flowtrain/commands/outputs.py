"""Files that commands write a part at a time; a file appears under its name only when it is whole."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import distributed, files

Rows = Mapping[str, np.ndarray]  # name -> values of a column; NaN or None: missing
SUFFIXES = ".csv", ".parquet"
ROW_GROUP = 2**16  # rows that are written to a parquet file at once


def table_path(output: str | None, default: Path) -> Path:
    """The path that ``output=`` names for a table, with ~ expanded; by default ``default``.

    Raises:
        UsageError: nothing can be written there.
    """
    path = Path(os.path.expanduser(output)) if output else default
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"output={output}: must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"output={output}: there is no folder {path.parent}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("output: .parquet files need more packages: pip install 'flowtrain[tables]'") from error
    return path


@contextmanager
def open_table(path: Path) -> Iterator[Callable[[Rows], None]]:
    """A function that appends rows to a new .csv or .parquet file. Raises WriteError."""
    with _whole(path) as temporary, ExitStack() as stack:
        write: Callable[[Rows], None] | None = None

        def append(rows: Rows) -> None:
            nonlocal write
            with files.convert_errors(path):
                write = write or stack.enter_context(_writer(temporary, path.suffix.lower(), rows))
                write(rows)

        yield append
        with files.convert_errors(path):
            stack.close()


@contextmanager
def open_array(path: Path, length: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends events to a new .npy file, which has ``length`` events in the end. Raises WriteError."""
    with _whole(path) as temporary, ExitStack() as stack:
        with files.convert_errors(path):
            file = stack.enter_context(temporary.open("wb"))

        def append(events: np.ndarray) -> None:
            with files.convert_errors(path, events.nbytes):
                if not file.tell():
                    header = {"descr": events.dtype.str, "fortran_order": False, "shape": (length, *events.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(events).data)
                file.flush()

        yield append


@contextmanager
def own_folder(run_dir: str, output: str | None) -> Iterator[Path]:
    """The folder for a command's files: ``output``, with ~ expanded, or ``run_dir``. Where ``run_dir`` has no files in
    the end, or a FlowtrainError came before them, it is removed with Hydra's record in it."""
    folder, chosen = Path(run_dir), Path(os.path.expanduser(output)) if output else Path(run_dir)
    try:
        yield chosen
    except FlowtrainError:
        _discard(folder)
        raise
    _discard(folder)


def _discard(folder: Path) -> None:
    if {path.name for path in folder.iterdir()} <= {".hydra"}:
        shutil.rmtree(folder)
        with suppress(OSError):  # others' results are there
            folder.parent.rmdir()


def free_name(name: str, taken) -> str:
    """``name``, with underscores behind it where a column has it already.

    >>> free_name("row", ["row", "height"])
    'row_'
    """
    while name in taken:
        name += "_"
    return name


def progress(total: int | None, unit: str):
    """A progress bar on the first process's terminal; elsewhere one that shows nothing."""
    return tqdm(total=total, unit=unit, unit_scale=True, disable=None if distributed.is_main() else True)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path, which becomes ``path`` at the end of this block."""
    temporary = files.temporary(path)
    try:
        yield temporary
        with files.convert_errors(path):
            os.replace(temporary, path)
    finally:
        files.discard(temporary)


def _writer(path: Path, suffix: str, rows: Rows):
    """What writes rows, with the columns of ``rows``, into a new file."""
    if suffix == ".csv" and find_spec("pyarrow") is None:
        return _plain_csv(path, rows)
    import pyarrow as pa

    fields = pa.table({name: _to_arrow(values) for name, values in rows.items()}).schema
    schema = pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in fields])
    return (_parquet if suffix == ".parquet" else _csv)(path, schema)


@contextmanager
def _plain_csv(path: Path, rows: Rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows)

        def write(rows: Rows) -> None:
            lists = [[None if value != value else value for value in values.tolist()] for values in rows.values()]
            writer.writerows(zip(*lists))

        yield write


@contextmanager
def _csv(path: Path, schema):
    import pyarrow as pa
    from pyarrow import compute
    from pyarrow import csv as arrow

    with path.open("wb") as file:
        names = StringIO()
        csv.writer(names, lineterminator="\n").writerow(schema.names)
        file.write(names.getvalue().encode())

        def write(rows: Rows) -> None:
            table = _to_table(rows, schema)
            texts = [column for column in table.columns if pa.types.is_string(column.type)]
            quote = any(compute.any(compute.match_substring_regex(text, '[",\r\n]')).as_py() for text in texts)
            style = "needed" if quote else "none"  # needed: in texts alone, but in all of them
            arrow.write_csv(table, file, arrow.WriteOptions(include_header=False, quoting_style=style))

        yield write


@contextmanager
def _parquet(path: Path, schema):
    import pyarrow as pa
    from pyarrow import parquet

    waiting: list[pa.Table] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def write(rows: Rows) -> None:
            waiting.append(_to_table(rows, schema))
            if sum(map(len, waiting)) >= ROW_GROUP:
                flush()

        def flush() -> None:
            writer.write_table(pa.concat_tables(waiting), ROW_GROUP)
            waiting.clear()

        yield write
        if waiting:
            flush()


def _to_table(rows: Rows, schema):
    import pyarrow as pa

    return pa.table([_to_arrow(rows[field.name], field.type) for field in schema], schema=schema)


def _to_arrow(values: np.ndarray, kind=None):
    import pyarrow as pa

    return pa.array(values, kind, from_pandas=True)
