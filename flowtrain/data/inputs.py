"""Inputs of commands: images, or rows of a table, read in order, one group at a time; and contexts to sample with.

The processes take turns: each has as many groups as the others, or one fewer, and its group follows that of the process
before it.
"""

import difflib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.data import array_files
from flowtrain.data.array_files import FolderRows, Rows, open_rows
from flowtrain.data.arrays import Arrays, Numbers, fit_numbers
from flowtrain.data.dataset import Dataset
from flowtrain.data.image_files import ImageFileSplit
from flowtrain.data.image_folders import common_folders, image_labels
from flowtrain.data.image_sources import SUFFIXES, Source, find_images
from flowtrain.data.labels import number_classes, printable
from flowtrain.data.loader import evaluation_batches
from flowtrain.data.split import Split
from flowtrain.data.tables.block import Block, join_names, nearest
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.columns import Columns
from flowtrain.data.tables.table import Table
from flowtrain.data.tables.table_file import TableFile, find_reader
from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger("flowtrain")

TABLES = "a table (csv, tsv, txt, parquet, feather, npy, npz, h5, jsonl, xlsx)"
IMAGES, NUMBERS = 2**12, 2**24  # most images, and numbers in them, of a group
ARRAY, ARCHIVES = ".npy", (".zip", ".tar", ".parquet")


@dataclass(frozen=True)
class Group:
    """Examples that follow one another.

    Attributes:
        first: the number of the first example, from 0.
        names: of the examples, (B,): the files of images, or the numbers of rows, from 1.
        x, context: (B, *shape) and (B, *context_shape) or None; zeros for an example in ``bad``.
        bad: a mapping from the position in the group of each unreadable example to a line that names it and says why.
    """

    first: int
    names: np.ndarray
    x: Tensor
    context: Tensor | None
    bad: dict[int, str]


class Input:
    """Examples at a path.

    Attributes:
        label: the column heading of the examples' names: "file" or "row".
        on_bad: "stop" raises FlowtrainError at an example that cannot be read, "skip" puts it into ``Group.bad``.
    """

    label = "row"
    on_bad = "stop"

    def groups(self, rank: int = 0, world: int = 1) -> Iterator[Group]:
        """The groups of this process, one in each turn; the last may lack one."""
        raise NotImplementedError

    def refuse(self, what: str) -> None:
        """Raise FlowtrainError for an example that has the fault ``what``, unless ``on_bad`` is "skip"."""
        if self.on_bad == "stop":
            raise FlowtrainError(f"{what}; on_bad=skip leaves it out")


class ImageFiles(Input):
    """A folder, .zip, .tar or .parquet of images, or one image, decoded as an image dataset decodes its own.

    Args:
        shape, shift, box, exact: see :class:`flowtrain.data.image_files.ImageFileSplit`.
        workers: number of processes that decode.
    """

    label = "file"

    def __init__(
        self, path: Path, shape, shift: int = 0, on_bad: str = "stop", box=None, exact: bool = False, workers: int = 0
    ):
        images = find_images(path) if path.is_dir() or path.suffix.lower() in ARCHIVES else _SingleImage(path)
        if not images.names:
            raise UsageError(f"{path} holds no images ({' '.join(SUFFIXES)})")
        self.split = ImageFileSplit(images, images.names, shape, shift, on_bad, box, exact)
        self.on_bad, self.workers = on_bad, workers

    def find_labels(self, classes: Sequence[str]) -> bool:
        """Take the class of each image from its folder, its .cls or its column. False where these have none."""
        images = self.split.source
        try:
            labels = image_labels(images, images.names, common_folders(images.names))
        except UsageError:
            return False
        self.split.labels = number_classes(labels, classes, printable(str(images.path)))
        self.split.classes = len(classes)
        return True

    def groups(self, rank=0, world=1):
        size = _group_size(len(self.split), self.split.shape, world)
        read = evaluation_batches(self.split, size, rank=rank, world=world, workers=self.workers)
        found = next(read, None)
        for first in range(rank * size, len(self.split), world * size):
            names = np.array(self.split.names[first : first + size], dtype=object)
            x = torch.zeros((len(names), *self.split.shape), dtype=torch.uint8)
            bad = set(range(len(names)))
            if found is not None and found[0][0] // size == first // size:  # otherwise none of the group is readable
                for place, image in zip((found[0] - first).tolist(), found[1]):
                    x[place] = image
                    bad.remove(place)
                found = next(read, None)
            context = self.split.context([*range(first, first + len(names))])
            names = [printable(name) for name in names]
            yield Group(first, names, x, context, {i: f"{names[i]}: {self.split.bad[first + i]}" for i in bad})


class _SingleImage(Source):
    """One image file as an image source."""

    def __init__(self, path: Path):
        self.path, self.names = path, [path.name]

    def location(self, name):
        return printable(str(self.path))

    def open(self, name):
        return open(self.path, "rb")


class ArrayRows(Input):
    """The rows of an array, as :class:`flowtrain.data.Arrays` reads them; one of a folder's files each, or by number.

    Args:
        numbers: how the array's numbers become those of the flow.
    """

    def __init__(self, rows: Rows, numbers: Numbers, on_bad: str = "stop"):
        self.rows, self.numbers, self.on_bad = rows, numbers, on_bad
        self.files = rows.files if isinstance(rows, FolderRows) and not rows.stacked else None
        self.label = "row" if self.files is None else "file"
        if not len(rows):
            raise UsageError(f"{rows.path} has no rows")

    def groups(self, rank=0, world=1):
        size = _group_size(len(self.rows), self.rows.shape, world)
        for first in range(rank * size, len(self.rows), world * size):
            stop = min(first + size, len(self.rows))
            x, bad = self.numbers.convert(self.rows.read(first, stop))
            names = [*range(first + 1, stop + 1)]
            if self.files is not None:
                names = [printable(str(file.relative_to(self.rows.path))) for file in self.files[first:stop]]
            called = [name if self.files else f"row {name} (the first is 1)" for name in names]
            faults = {int(i): f"{called[i]}: {self.numbers.fault()}" for i in np.flatnonzero(bad)}
            for line in faults.values():
                self.refuse(f"{printable(str(self.rows.path))}: {line}")
            x[torch.from_numpy(bad)] = 0
            yield Group(first, names, x, None, faults)


class SplitRows(Input):
    """The examples of a split; those that cannot be read and are skipped are in no group.

    Args:
        workers: number of processes that decode, for a split that streams.
    """

    def __init__(self, split: Split, on_bad: str = "stop", workers: int = 0):
        self.split, self.on_bad, self.workers = split, on_bad, workers

    def groups(self, rank=0, world=1):
        size = _group_size(len(self.split), self.split.shape, world)
        for index, x, context in evaluation_batches(self.split, size, "cpu", rank, world, workers=self.workers):
            yield Group(int(index[0]), index.numpy() + 1, x, context, {})


def open_arrays(path: Path, data: Dataset, on_bad: str) -> ArrayRows | None:
    """The rows of the arrays at ``path`` for a model of ``data``; None where there are none. A folder is one of images,
    except for a model of arrays."""
    of_arrays, is_array = isinstance(data, Arrays), path.suffix.lower() in array_files.SUFFIXES
    if not (is_array or of_arrays and path.is_dir()):
        return None
    rows = open_rows(path, data.key if of_arrays else None, data.layout if of_arrays else None)
    return ArrayRows(rows, data.numbers_of(rows) if of_arrays else fit_numbers(rows, data.spec), on_bad)


class TableRows(Input):
    """The rows of a table, whose columns are found by the names of ``columns``: see :func:`match_names`. The processes
    share out each block of rows that is read.

    Args:
        data: the model's data set; of a table, whose options read a file of the same format.
    """

    def __init__(self, path: Path, columns: Columns, on_bad: str = "stop", data: Dataset | None = None):
        self.path, self.columns, self.on_bad = path, columns, on_bad
        self.file = open_table(path, columns, data)
        self.names = match_names(path, [*columns.names, *columns.context_names], self.file.names)

    def groups(self, rank=0, world=1):
        first, found = 0, False
        for block in self.file.blocks(list(self.names.values())):
            rows = len(next(iter(block.values())))
            if not rows:
                continue
            start, stop = rows * rank // world, rows * (rank + 1) // world
            yield self._group(first + start, {name: block[theirs][start:stop] for name, theirs in self.names.items()})
            first, found = first + rows, True
        if not found:
            raise UsageError(f"{self.path} has no rows")

    def _group(self, first: int, block: Block) -> Group:
        rows = len(next(iter(block.values())))
        x, bad = torch.zeros(rows, len(self.columns.encoded)), {}
        context = torch.zeros(rows, *self.columns.context_shape) if self.columns.context else None
        left = [(0, rows)] if rows else []
        while left:  # an unreadable row is found by halving
            start, stop = left.pop()
            try:
                part = {name: values[start:stop] for name, values in block.items()}
                encoded = self.columns.encode(part, first + start + 1)
            except UsageError as error:
                self.refuse(f"{self.path}: {error}")
                if stop - start == 1:
                    bad[start] = str(error)
                else:
                    middle = (start + stop) // 2
                    left += [(start, middle), (middle, stop)]
                continue
            x[start:stop] = encoded[0]
            if context is not None:
                context[start:stop] = encoded[1]
        return Group(first, _row_numbers(first, rows), x, context, bad)


def match_names(path: Path, wanted: Sequence[str], available: Sequence[str]) -> dict[str, str]:
    """The name in the file of each of the model's columns.

    Columns of an array have no names and are taken by position. So are those of any table if the model's have only the
    default names x0, x1, …. Raises UsageError for a column that is absent.
    """
    names = {name: name for name in wanted}
    are_default = list(wanted) == [f"x{i}" for i in range(len(wanted))]
    if not {*wanted} <= {*available} and (are_default or path.suffix.lower() == ARRAY):
        if len(available) != len(wanted):
            raise UsageError(f"{path} has {len(available)} columns; this model takes {len(wanted)}")
        names = dict(zip(wanted, available))
    for name in names.values():
        if name not in available:
            near = nearest(name, available)
            hint = f"did you mean '{near}'?" if near else f"there are {join_names(available)}"
            raise UsageError(f"{path} has no column '{name}'; {hint}")
    return names


def open_table(path: Path, columns: Columns, data: Dataset | None) -> TableFile:
    """A table with ``columns``, read with the options of ``data`` where that is a table of the same format.

    Raises:
        UsageError: it is not a table.
    """
    if not (path.is_dir() or find_reader(path)):
        raise UsageError(f"{path}: this model takes rows: {TABLES}")
    same = isinstance(data, Table) and data.path is not None and find_reader(data.path) is find_reader(path)
    file = TableFile(path, text=columns.texts, **({"read": data.read, "key": data.key} if same else {}))
    for note in file.notes:
        log.info("%s: %s", path, note)
    return file


def read_contexts(path: Path, columns: Columns, data: Dataset) -> tuple[dict[str, np.ndarray], Tensor]:
    """The context columns of all rows of a table: as the file has them, and encoded, float32 (N, C).

    Raises:
        UsageError: the table has no rows, lacks a column, or holds a value that is missing or unknown.
    """
    file = open_table(path, columns, data)
    names = match_names(path, columns.context_names, file.names)
    blocks = list(file.blocks(list(names.values())))
    if not sum(len(next(iter(block.values()))) for block in blocks):
        raise UsageError(f"{path} has no rows")
    values = {name: np.concatenate([block[theirs] for block in blocks]) for name, theirs in names.items()}
    try:
        return values, columns.encode_context(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def unnamed_columns(dims: int, grey_levels: int | None) -> Columns:
    """Columns named x0, x1, … for rows of D numbers: integers if there are ``grey_levels``, otherwise real."""
    kind = "integer" if grey_levels else "real"
    return Columns(tuple(Column(f"x{i}", kind) for i in range(dims)))


def input_path(path: str, key: str = "input") -> Path:
    """``key=path`` with ~ expanded. Raises UsageError if there is nothing."""
    found = Path(os.path.expanduser(path))
    if not found.exists():
        siblings = [item.name for item in found.parent.iterdir()] if found.parent.is_dir() else []
        near = difflib.get_close_matches(found.name, siblings, 1)
        hint = f"; did you mean {found.parent / near[0]}?" if near else ""
        raise UsageError(f"{key}={path}: no such file or folder{hint}")
    return found


def _group_size(length: int, shape: Sequence[int], world: int) -> int:
    """How many of ``length`` images are a group: so few that each process gets one."""
    return max(1, min(IMAGES, NUMBERS // math.prod(shape), -(-length // world)))


def _row_numbers(first: int, rows: int) -> np.ndarray:
    return np.arange(first + 1, first + rows + 1)
