"""Inputs of ``flowtrain score``: images, or rows of a table, read in order, one group at a time.

A group has ``GROUP`` examples, whatever the batch size, and belongs to one process.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.image_files import SUFFIXES, ImageFileSplit, find_images
from flowtrain.data.loader import evaluation_batches
from flowtrain.data.tables.arrays import Array
from flowtrain.data.tables.block import Block
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.columns import Columns
from flowtrain.data.tables.table_file import READERS, TableFile
from flowtrain.errors import FlowtrainError, UsageError

GROUP = 256
TABLES, ARRAY, ARCHIVES = tuple(READERS), ".npy", (".zip", ".tar")


@dataclass(frozen=True)
class Group:
    """Up to ``GROUP`` examples.

    Attributes:
        first: the number of the first example, from 0.
        names: of the examples: the file of an image, or the number of a row, from 1.
        x, context: (B, *shape) and (B, *context_shape) or None; zeros for an example in ``bad``.
        bad: a mapping from the position in the group of each unreadable example to a line that names it and says why.
    """

    first: int
    names: list[str | int]
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
        """The groups of this process: numbers rank, rank + world, …."""
        raise NotImplementedError

    def refuse(self, what: str) -> None:
        """Raise FlowtrainError for an example that has the fault ``what``, unless ``on_bad`` is "skip"."""
        if self.on_bad == "stop":
            raise FlowtrainError(f"{what}; on_bad=skip leaves it out")


class ImageFiles(Input):
    """A folder, .zip or .tar of images, or one image, decoded as an image dataset decodes its own.

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

    def groups(self, rank=0, world=1):
        read = evaluation_batches(self.split, GROUP, rank=rank, world=world, workers=self.workers)
        found = next(read, None)
        for first in range(rank * GROUP, len(self.split), world * GROUP):
            names = self.split.names[first : first + GROUP]
            x = torch.zeros((len(names), *self.split.shape), dtype=torch.uint8)
            bad = set(range(len(names)))
            if found is not None and found[0][0] // GROUP == first // GROUP:  # otherwise none of the group is readable
                for place, image in zip((found[0] - first).tolist(), found[1]):
                    x[place] = image
                    bad.remove(place)
                found = next(read, None)
            yield Group(first, names, x, None, {i: f"{names[i]}: {self.split.bad[first + i]}" for i in bad})


class _SingleImage:
    """One image file as an image source."""

    def __init__(self, path: Path):
        self.path, self.names = path, [path.name]

    def location(self, name: str) -> str:
        return str(self.path)

    def open(self, name: str) -> BinaryIO:
        return open(self.path, "rb")


class ImageArray(Input):
    """Integers 0 … grey_levels − 1 in an .npy array, (N, *shape), or (N, height, width) for grey images."""

    def __init__(self, path: Path, shape: tuple[int, ...], grey_levels: int, on_bad: str = "stop"):
        self.path, self.shape, self.grey_levels, self.on_bad = path, tuple(shape), grey_levels, on_bad
        self.array = Array(path)
        fitting = [self.shape, self.shape[1:]] if self.shape[0] == 1 else [self.shape]
        if self.array.shape[1:] not in fitting or self.array.dtype.kind not in "iu":
            wanted = " or ".join(f"[N, {', '.join(map(str, one))}]" for one in fitting)
            holds = f"{self.array.dtype} {list(self.array.shape)}"
            raise UsageError(f"{path} holds {holds}: this model takes integers of shape {wanted}")
        if not len(self.array):
            raise UsageError(f"{path} has no rows")

    def groups(self, rank=0, world=1):
        for first in range(rank * GROUP, len(self.array), world * GROUP):
            part = np.array(self.array[first : first + GROUP]).reshape(-1, *self.shape)
            inside = ((part >= 0) & (part < self.grey_levels)).reshape(len(part), -1).all(1)
            why = f"values outside 0 … {self.grey_levels - 1}"
            bad = {int(i): f"row {first + i + 1} (the first is 1): {why}" for i in np.flatnonzero(~inside)}
            for line in bad.values():
                self.refuse(f"{self.path}: {line}")
            part[~inside] = 0
            x = torch.from_numpy(part.astype(np.uint8 if self.grey_levels <= 256 else np.int64))
            yield Group(first, list(range(first + 1, first + len(part) + 1)), x, None, bad)


class TableRows(Input):
    """The rows of a table, whose columns are found by the names of ``columns``.

    Columns of an array have no names and are taken by position. So are those of any table if ``columns`` have only
    the default names x0, x1, ….
    """

    def __init__(self, path: Path, columns: Columns, on_bad: str = "stop"):
        self.path, self.columns, self.on_bad = path, columns, on_bad
        self.file = TableFile(path)
        wanted, available = [*columns.names, *columns.context_names], self.file.names
        self.names = {name: name for name in wanted}  # name in the model -> name in the file
        are_default = wanted == [f"x{i}" for i in range(len(wanted))]
        if not {*wanted} <= {*available} and (are_default or path.suffix.lower() == ARRAY):
            if len(available) != len(wanted):
                raise UsageError(f"{path} has {len(available)} columns; this model takes {len(wanted)}")
            self.names = dict(zip(wanted, available))
        for name in self.names.values():
            if name not in available:
                near = difflib.get_close_matches(name, available, 1)
                listed = ", ".join(available[:12]) + (", …" if len(available) > 12 else "")
                hint = f"did you mean '{near[0]}'?" if near else f"there are {listed}"
                raise UsageError(f"{path} has no column '{name}'; {hint}")
            if available.count(name) > 1:
                raise UsageError(f"{path} has two columns '{name}'")

    def groups(self, rank=0, world=1):
        first, found = 0, None
        for found, block in enumerate(_regroup(self.file.blocks(list(self.names.values())))):
            rows = len(next(iter(block.values())))
            if found % world == rank:
                yield self._group(first, {name: block[theirs] for name, theirs in self.names.items()}, rows)
            first += rows
        if found is None:
            raise UsageError(f"{self.path} has no rows")

    def _group(self, first: int, block: Block, rows: int) -> Group:
        names = list(range(first + 1, first + rows + 1))
        try:
            return Group(first, names, *self.columns.encode(block, first + 1), {})
        except UsageError as error:
            self.refuse(f"{self.path}: {error}")
        bad, encoded = {}, []
        for place in range(rows):
            try:
                one = {name: values[place : place + 1] for name, values in block.items()}
                row = self.columns.encode(one, names[place])
            except UsageError as error:
                bad[place], row = str(error), None
            encoded.append(row)
        x, context = torch.zeros(rows, len(self.columns.names)), None
        if self.columns.context:
            context = torch.zeros(rows, *self.columns.context_shape)
        for place, row in enumerate(encoded):
            if row is not None:
                x[place] = row[0][0]
                if context is not None:
                    context[place] = row[1][0]
        return Group(first, names, x, context, bad)


def unnamed_columns(dims: int, grey_levels: int | None) -> Columns:
    """Columns named x0, x1, … for rows of D numbers: integers if there are ``grey_levels``, otherwise real."""
    kind = "integer" if grey_levels else "real"
    return Columns(tuple(Column(f"x{i}", kind) for i in range(dims)))


def input_path(path: str) -> Path:
    """``input=path`` with ~ expanded. Raises UsageError if there is nothing."""
    found = Path(os.path.expanduser(path))
    if not found.exists():
        siblings = [item.name for item in found.parent.iterdir()] if found.parent.is_dir() else []
        near = difflib.get_close_matches(found.name, siblings, 1)
        hint = f"; did you mean {found.parent / near[0]}?" if near else ""
        raise UsageError(f"input={path}: no such file or folder{hint}")
    return found


def _regroup(blocks: Iterator[Block]) -> Iterator[Block]:
    """Turn blocks of any length into blocks of ``GROUP`` rows and a last shorter one."""
    rest: Mapping[str, np.ndarray] = {}
    for block in blocks:
        block = {name: np.concatenate([rest[name], values]) if rest else values for name, values in block.items()}
        rows = len(next(iter(block.values())))
        for start in range(0, rows - rows % GROUP, GROUP):
            yield {name: values[start : start + GROUP] for name, values in block.items()}
        rest = {name: values[rows - rows % GROUP :] for name, values in block.items()}
    if rest and len(next(iter(rest.values()))):
        yield dict(rest)
