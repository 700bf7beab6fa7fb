"""What a person wants judged: images or rows of a table, read in order, a group at a time.

Groups are of ``GROUP`` examples whatever is worked on at once, and are dealt out to the processes whole.
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

from flowtrain.data.columns import Columns
from flowtrain.data.image_files import SUFFIXES, ImageFileSplit, find_images
from flowtrain.data.loader import evaluation_batches
from flowtrain.data.table_file import READERS, Array, Block, Column, TableFile
from flowtrain.errors import FlowtrainError, UsageError

GROUP = 256
TABLES, ARRAY, ARCHIVES = tuple(READERS), ".npy", (".zip", ".tar")


@dataclass(frozen=True)
class Group:
    """Up to ``GROUP`` examples.

    Attributes:
        first: the number of the first one, from 0.
        names: what each is called: an image's file, or the number of a row, from 1.
        x, context: of all of them, zeros where one is in ``bad``.
        bad: place in the group -> a line that says which one could not be read, and why.
    """

    first: int
    names: list[str | int]
    x: Tensor
    context: Tensor | None
    bad: dict[int, str]


class Input:
    """Examples at a path.

    Attributes:
        label: the heading of their names: "file" or "row".
        on_bad: "stop" raises FlowtrainError at an example that cannot be read, "skip" puts it into ``Group.bad``.
    """

    label = "row"
    on_bad = "stop"

    def groups(self, rank: int = 0, world: int = 1) -> Iterator[Group]:
        """Those whose turn it is: number rank, rank + world, …."""
        raise NotImplementedError

    def refuse(self, what: str) -> None:
        """Stop at what is wrong with an example, unless such are to be skipped."""
        if self.on_bad == "stop":
            raise FlowtrainError(f"{what}; on_bad=skip would leave it out")


class ImageFiles(Input):
    """A folder, a .zip or a .tar of images, or one image, as an image set reads its own.

    Args:
        shape, shift, box, exact: see :class:`flowtrain.data.image_files.ImageFileSplit`.
        workers: processes that decode.
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
            if found is not None and found[0][0] // GROUP == first // GROUP:  # else none of them could be read
                for place, image in zip((found[0] - first).tolist(), found[1]):
                    x[place] = image
                    bad.remove(place)
                found = next(read, None)
            yield Group(first, names, x, None, {i: f"{names[i]}: {self.split.bad[first + i]}" for i in bad})


class _SingleImage:
    """An image, as a source of images."""

    def __init__(self, path: Path):
        self.path, self.names = path, [path.name]

    def location(self, name: str) -> str:
        return str(self.path)

    def open(self, name: str) -> BinaryIO:
        return open(self.path, "rb")


class ImageArray(Input):
    """Images as integers 0 … levels − 1 in an .npy, (N, *shape), or (N, height, width) where they are grey."""

    def __init__(self, path: Path, shape: tuple[int, ...], levels: int, on_bad: str = "stop"):
        self.path, self.shape, self.levels, self.on_bad = path, tuple(shape), levels, on_bad
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
            inside = ((part >= 0) & (part < self.levels)).reshape(len(part), -1).all(1)
            why = f"values outside 0 … {self.levels - 1}"
            bad = {int(i): f"row {first + i + 1} (the first is 1): {why}" for i in np.flatnonzero(~inside)}
            for line in bad.values():
                self.refuse(f"{self.path}: {line}")
            part[~inside] = 0
            x = torch.from_numpy(part.astype(np.uint8 if self.levels <= 256 else np.int64))
            yield Group(first, list(range(first + 1, first + len(part) + 1)), x, None, bad)


class TableRows(Input):
    """The rows of a table, by the names of ``columns``; of an array, which has no names, by position.

    Position serves too where ``columns`` have only made-up names (x0, x1, …).
    """

    def __init__(self, path: Path, columns: Columns, on_bad: str = "stop"):
        self.path, self.columns, self.on_bad = path, columns, on_bad
        self.file = TableFile(path)
        wanted, there = [*columns.names, *columns.context_names], self.file.names
        self.names = {name: name for name in wanted}  # the model's -> the file's
        made_up = wanted == [f"x{i}" for i in range(len(wanted))]
        if not {*wanted} <= {*there} and (made_up or path.suffix.lower() == ARRAY):
            if len(there) != len(wanted):
                raise UsageError(f"{path} has {len(there)} columns; this model takes {len(wanted)}")
            self.names = dict(zip(wanted, there))
        for name in self.names.values():
            if name not in there:
                near = difflib.get_close_matches(name, there, 1)
                listed = ", ".join(there[:12]) + (", …" if len(there) > 12 else "")
                hint = f"did you mean '{near[0]}'?" if near else f"there are {listed}"
                raise UsageError(f"{path} has no column '{name}'; {hint}")
            if there.count(name) > 1:
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


def unnamed_columns(dims: int, levels: int | None) -> Columns:
    """Of rows of which nothing is known but their number, D; integers where they have ``levels``."""
    kind = "integer" if levels else "real"
    return Columns(tuple(Column(f"x{i}", kind) for i in range(dims)))


def input_path(path: str) -> Path:
    """UsageError where there is nothing at ``path``."""
    found = Path(os.path.expanduser(path))
    if not found.exists():
        siblings = [item.name for item in found.parent.iterdir()] if found.parent.is_dir() else []
        near = difflib.get_close_matches(found.name, siblings, 1)
        hint = f"; did you mean {found.parent / near[0]}?" if near else ""
        raise UsageError(f"input={path}: no such file or folder{hint}")
    return found


def _regroup(blocks: Iterator[Block]) -> Iterator[Block]:
    """Blocks of any length as ones of ``GROUP`` rows, and one of what is left."""
    rest: Mapping[str, np.ndarray] = {}
    for block in blocks:
        block = {name: np.concatenate([rest[name], values]) if rest else values for name, values in block.items()}
        rows = len(next(iter(block.values())))
        for start in range(0, rows - rows % GROUP, GROUP):
            yield {name: values[start : start + GROUP] for name, values in block.items()}
        rest = {name: values[rows - rows % GROUP :] for name, values in block.items()}
    if rest and len(next(iter(rest.values()))):
        yield dict(rest)
