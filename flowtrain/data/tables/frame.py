"""A table in memory: a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from flowtrain.data.tables.arrow_files import ArrowReader
from flowtrain.data.tables.table import Table
from flowtrain.data.tables.table_file import TableFile
from flowtrain.errors import UsageError


class Frame(Table):
    """The rows of ``frame``, a pandas DataFrame, whose index is left out.

    Its columns are understood as those of a file: see :class:`Table`, whose keys are taken here too.
    """

    native_name = "frame"
    default_test = 0.1

    def __init__(self, frame, **keys):
        super().__init__(path="x", **keys)  # what messages call it
        self.frame = frame
        self.test_size = 0  # all rows are for training and validation

    @cached_property
    def _file(self) -> TableFile:
        texts = [name for name, declared in self.types.items() if declared.kind == "categorical"]
        return _FrameFile(self.frame, texts)


class _FrameFile(TableFile):
    def __init__(self, frame, texts):
        self.path = Path("x")
        self._reader = _FrameReader(frame, texts)
        self.names, self.notes = self._reader.names, self._reader.notes


class _FrameReader(ArrowReader):
    def __init__(self, frame, texts):
        try:
            import pyarrow as pa
        except ImportError as error:
            raise UsageError("a DataFrame needs more packages: pip install 'flowtrain[tables]'") from error
        try:
            self.table = pa.Table.from_pandas(frame, preserve_index=False)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise UsageError(f"a column of x cannot be read: {' '.join(str(error).split())[:300]}") from error
        self.schema = self.table.schema
        self.prepare(texts)

    def batches(self, places: list[int], rows: int) -> Iterator:
        yield from self.table.select(places).to_batches(rows)
