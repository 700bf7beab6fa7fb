"""The files of Apache Arrow: .parquet, or a folder of its parts, and .feather and .arrow."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flowtrain.data.tables.block import (
    INDEX_NAMES,
    LEAVE_OUT,
    Block,
    Kind,
    Reader,
    check_options,
    counts,
    index_note,
    join_names,
    name_columns,
    number_texts,
    rows_of_block,
    time_texts,
)
from flowtrain.errors import FlowtrainError, UsageError

REFUSED = {"columns": "dataset.columns=[…] chooses columns", "source": "dataset.path=FILE names the file"}
LEAN = {"pre_buffer": False, "buffer_size": 2**17}  # of ParquetFile: a row group is not in memory as a whole
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # in a unit of Arrow's durations and times of day


class ArrowReader(Reader):
    """Record batches with a schema.

    A subclass sets ``schema``, and yields batches that hold at least the columns of these places.
    """

    schema: object

    def batches(self, places: list[int], rows: int) -> Iterator:
        raise NotImplementedError

    def prepare(self, text: Sequence[str]) -> None:
        """Set names and notes once ``schema`` is known; those in ``text`` hold text."""
        self.text, given = {*text}, self.schema.names
        self.places = [*range(len(given))]
        self.names, self.notes = name_columns(given)
        self._place = dict(zip(self.names, self.places))
        for place, name in enumerate(given):
            if name in INDEX_NAMES and len(given) > 1 and (name.startswith("__") or self._counts(place)):
                self.notes = [*self.notes, index_note(name)]
                self.names = [other for other in self.names if self._place[other] != place]
                break

    def kinds(self, names):
        return {name: self._kind(name) for name in names}

    def _kind(self, name: str) -> Kind:
        kind = kind_of(self.schema.field(self._place[name]).type)
        if kind is None:
            held = self.schema.field(self._place[name]).type
            raise UsageError(f"column '{name}' holds {held}: write it as numbers, times or text; {LEAVE_OUT}")
        return "text" if name in self.text else kind

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        kinds = self.kinds(names)
        places = sorted(self._place[name] for name in names)
        where = {place: i for i, place in enumerate(places)}
        rows = rows_of_block(len(names))
        for batch in self.batches(places, rows):
            for start in range(0, batch.num_rows, rows):
                part = batch.slice(start, rows)
                yield {name: to_values(part.column(where[self._place[name]]), kinds[name] == "text") for name in names}

    def _counts(self, place: int) -> bool:
        import pyarrow as pa

        if not pa.types.is_integer(self.schema.field(place).type):
            return False
        batch = next(self.batches([place], 1000), None)
        return batch is not None and counts(to_values(batch.column(0)[:1000], False))


class Parquet(ArrowReader):
    """A .parquet file, or a folder of such parts, in the order of their names."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str]):
        from pyarrow import parquet

        check_options(read, inspect.signature(parquet.ParquetFile).parameters.keys() - {*REFUSED}, "parquet", REFUSED)
        self.path, self.options = path, LEAN | {**read}
        self.files = parquet_parts(path) if path.is_dir() else [path]
        self.schema = self._schema(self.files[0])
        for file in self.files[1:]:
            self._check_part(file)
        self.prepare(text)

    def _schema(self, file: Path):
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(file, **self.options) as opened:
                return opened.schema_arrow
        except Exception as error:
            if file == self.path:
                raise
            raise FlowtrainError(f"cannot read {file}: {' '.join(str(error).split())}") from error

    def _check_part(self, file: Path) -> None:
        schema = self._schema(file)
        if schema.names != self.schema.names:
            other = sorted({*schema.names} ^ {*self.schema.names})
            raise UsageError(
                f"{file.name} has other columns than {self.files[0].name}: "
                + (f"only one has {join_names(other)}" if other else "their order differs")
            )
        for ours, theirs in zip(self.schema, schema):
            if kind_of(ours.type) != kind_of(theirs.type):
                raise UsageError(
                    f"column '{ours.name}' holds {theirs.type} in {file.name}, but {ours.type} in {self.files[0].name}"
                )

    def batches(self, places, rows):
        from pyarrow import parquet

        names = self.schema.names
        wanted = list(dict.fromkeys(names[place] for place in places))
        for file in self.files:
            with parquet.ParquetFile(file, **self.options) as opened:
                for batch in opened.iter_batches(rows, columns=wanted):
                    yield batch.select(_found(batch.schema.names, names, places))


def parquet_parts(folder: Path) -> list[Path]:
    """The parts in a folder, in the order of their names. Hidden files and those that start with _ are none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".parquet" and file.is_file())
    hidden = [any(part.startswith(("_", ".")) for part in file.relative_to(folder).parts) for file in files]
    files = [file for file, is_hidden in zip(files, hidden) if not is_hidden]
    if not files:
        raise UsageError(f"dataset.path={folder}: a folder must hold parts that end in .parquet")
    divided = [part for file in files for part in file.relative_to(folder).parts[:-1] if "=" in part]
    if divided:
        raise UsageError(f"dataset.path={folder}: its parts are divided by a column ({divided[0]}); choose one folder")
    return files


def _found(found: list[str], names: list[str], places: list[int]) -> list[int]:
    """Where columns that are at ``places`` among ``names`` are among the ``found`` ones; a name may occur twice."""
    where: dict[str, list[int]] = {}
    for i, name in enumerate(found):
        where.setdefault(name, []).append(i)
    seen: Counter[str] = Counter()
    occurrence = {}
    for place, name in enumerate(names):
        occurrence[place] = seen[name]
        seen[name] += 1
    return [where[names[place]][occurrence[place]] for place in places]


class ArrowFile(ArrowReader):
    """A .feather or .arrow file, also one in the format of streams."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str]):
        check_options(read, (), "feather and arrow files", REFUSED)
        self.path = path
        with self._source() as source, self._open(source, None) as opened:
            self.schema = opened.schema
        self.prepare(text)

    def _source(self):
        import pyarrow as pa

        return pa.OSFile(str(self.path))

    def _open(self, source, places: list[int] | None):
        from pyarrow import ipc

        options = ipc.IpcReadOptions(included_fields=places)
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        return (ipc.open_file if is_file else ipc.open_stream)(source, options=options)

    def batches(self, places, rows):
        with self._source() as source, self._open(source, places) as opened:
            count = getattr(opened, "num_record_batches", None)  # a stream does not know
            for batch in opened if count is None else map(opened.get_batch, range(count)):
                batch.validate(full=True)  # damaged values would end the process
                yield batch


def kind_of(arrow_type) -> Kind | None:
    """What a column of this type holds; None: what can be no column of a table."""
    from pyarrow import types

    while types.is_dictionary(arrow_type) or types.is_run_end_encoded(arrow_type):
        arrow_type = arrow_type.value_type
    if types.is_boolean(arrow_type):
        return "boolean"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return "text"
    if types.is_timestamp(arrow_type) or types.is_date(arrow_type):
        return "time"
    numbers = (types.is_integer, types.is_floating, types.is_decimal, types.is_null, types.is_time, types.is_duration)
    return "number" if any(is_kind(arrow_type) for is_kind in numbers) else None


def to_values(column, as_text: bool) -> np.ndarray:
    """A column of Arrow's as one of a block. Decimals are rounded to float64, times of day and durations are seconds,
    and a time with a zone is that in UTC."""
    import pyarrow as pa
    from pyarrow import compute, types

    while types.is_dictionary(column.type) or types.is_run_end_encoded(column.type):
        is_dictionary = types.is_dictionary(column.type)
        column = column.dictionary_decode() if is_dictionary else compute.run_end_decode(column)
    kind, given = kind_of(column.type), column.type
    if kind == "time":
        values = _times(column)
        return time_texts(values) if as_text else values
    if kind == "boolean" or as_text and types.is_integer(given):
        return column.cast(pa.string()).to_numpy(zero_copy_only=False)
    if kind == "text":
        values = column.to_numpy(zero_copy_only=False)
        return np.where(values == "", None, values)
    in_units = types.is_time(given) or types.is_duration(given)
    if in_units:
        column = column.cast(pa.int32() if types.is_time32(given) else pa.int64())
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    values = values * SECONDS[given.unit] if in_units else values
    return number_texts(values) if as_text else values


def _times(column) -> np.ndarray:
    import pyarrow as pa
    from pyarrow import types

    zone = getattr(column.type, "tz", None)
    if types.is_date(column.type):
        column = column.cast(pa.timestamp("s" if types.is_date32(column.type) else "ms"))
    return column.cast(pa.timestamp("us", zone), safe=False).cast(pa.timestamp("us")).to_numpy(zero_copy_only=False)
