"""Arrays in files, read by row: .npy, .npz, .h5, .zarr, or a folder of .npy. None is held in memory as a whole."""

from __future__ import annotations

import math
import os
import struct
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flowtrain.errors import FlowtrainError, UsageError

HDF5 = (".h5", ".hdf5")
SUFFIXES = (".npy", ".npz", *HDF5, ".zarr")
BLOCK_BYTES = 2**24  # of rows that are read at once
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LOCAL_HEADER = 30  # bytes of a zip member's header, before its name


class Rows:
    """The rows of an array in a file.

    Attributes:
        path: of the file or folder.
        shape: (N, …), the number of rows first.
        dtype: of the numbers.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop − 1. Raises FlowtrainError where the file cannot be read any more."""
        raise NotImplementedError

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The rows with these numbers, in any order and as often as they occur."""
        numbers, places = np.unique(numbers, return_inverse=True)
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
        parts = [self.read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return np.concatenate(parts)[places] if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows in order, some at a time, each time with the number of the first."""
        each = max(1, BLOCK_BYTES // max(1, self.dtype.itemsize * math.prod(self.shape[1:])))
        for start in range(0, len(self), each):
            yield start, self.read(start, min(start + each, len(self)))

    def name(self, number: int) -> str:
        """A row in words for a message."""
        return f"index {number}"


class NpyRows(Rows):
    """An .npy array that starts at byte ``at`` of a file. It is read, not mapped into memory: a map kills the process
    without a message when another process truncates the file. Only an array stored by columns is held as a whole."""

    def __init__(self, path: Path, at: int = 0):
        self.path = path
        with _name_file_in_errors(path), open(path, "rb") as file:
            file.seek(at)
            self.shape, by_columns, self.dtype = read_array_header(path, file)
            self.start = file.tell()
            self.each = self.dtype.itemsize * math.prod(self.shape[1:])  # bytes of a row
            self.whole = None
            if by_columns and len(self.shape) > 1:
                numbers = np.fromfile(file, self.dtype, math.prod(self.shape))
                self.whole = numbers.reshape(self.shape, order="F")

    def read(self, start, stop):
        return self._read([(start, stop - start)]) if self.whole is None else self.whole[start:stop]

    def take(self, numbers):
        return self._read([(number, 1) for number in numbers.tolist()]) if self.whole is None else self.whole[numbers]

    def _read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """Rows of each (first, how many), one run after another."""
        data, at = np.empty(self.each * sum(rows for _, rows in runs), np.uint8), 0
        with _name_file_in_errors(self.path), open(self.path, "rb", buffering=0) as file:
            for first, rows in runs:
                file.seek(self.start + self.each * first)
                end = at + self.each * rows
                while at < end and (found := file.readinto(data[at:end])):
                    at += found
                if at < end:
                    raise FlowtrainError(f"cannot read {self.path} from {self.name(first)} on: it is truncated")
        return data.view(self.dtype).reshape(-1, *self.shape[1:])


class HeldRows(Rows):
    """An array in memory, of a file that allows no reading by row."""

    def __init__(self, path: Path, array: np.ndarray):
        self.path, self.array, self.shape, self.dtype = path, array, array.shape, array.dtype

    def read(self, start, stop):
        return self.array[start:stop]


class SlicedRows(Rows):
    """A dataset of an .h5 or .zarr file: an object with slices."""

    def __init__(self, path: Path, dataset):
        if path.suffix.lower() in HDF5:
            check_written(dataset)
        self.path, self.dataset = path, dataset
        self.shape, self.dtype = tuple(dataset.shape), np.dtype(dataset.dtype)

    def read(self, start, stop):
        with _name_file_in_errors(self.path):
            return np.asarray(self.dataset[start:stop])


class FolderRows(Rows):
    """The .npy files of a folder and its subfolders, sorted by path: one row each, or the rows of each in turn."""

    def __init__(self, path: Path, files: list[Path], stacked: bool):
        self.path, self.files, self.stacked = path, files, stacked
        first = NpyRows(files[0])
        self.dtype, self._event = first.dtype, first.shape[1:] if stacked else first.shape
        self._ends = list(np.cumsum([len(self._open(file)) for file in files])) if stacked else []
        self.shape = (int(self._ends[-1]) if stacked else len(files), *self._event)

    def _open(self, file: Path) -> NpyRows:
        rows = NpyRows(file)
        if (rows.dtype, rows.shape[1:] if self.stacked else rows.shape) != (self.dtype, self._event):
            raise FlowtrainError(
                f"{file} holds {rows.dtype} {list(rows.shape)}, unlike {self.files[0]} with {self.dtype}"
                f" {[*(['N'] if self.stacked else []), *self._event]}".replace("'", "")
            )
        return rows

    def read(self, start, stop):
        if not self.stacked:
            files = [self._open(file) for file in self.files[start:stop]]
            return np.stack([file.read(0, len(file)) for file in files])
        parts = []
        while start < stop:
            number = bisect_right(self._ends, start)
            end = int(self._ends[number])
            rows = self._open(self.files[number])
            base = end - len(rows)
            parts.append(rows.read(start - base, min(stop, end) - base))
            start = end
        return np.concatenate(parts)

    def name(self, number):
        return f"{self.files[number]}" if not self.stacked else super().name(number)


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is stored by columns, and dtype, from the header of an array in the format of .npy. Raises
    many kinds of errors for a damaged one."""
    with warnings.catch_warnings(action="ignore"):  # of a damaged header
        shape, by_columns, dtype = NPY_HEADERS[np.lib.format.read_magic(file)](file)
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {list(shape)}")
    return shape, by_columns, dtype


def read_array_header(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """As :func:`read_npy_header`, of an array of numbers, texts or records whose values follow in the file at ``path``.

    Raises:
        FlowtrainError: it is damaged, cut off or holds Python objects.
    """
    try:
        shape, by_columns, dtype = read_npy_header(file)
        if dtype.itemsize == 0 and math.prod(shape):
            raise ValueError("its values have no bytes")
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise FlowtrainError(f"cannot read {path}: it is not an .npy array of numbers") from error
    if dtype.hasobject:
        raise FlowtrainError(f"cannot read {path}: it holds Python objects, not numbers")
    size, expected = os.fstat(file.fileno()).st_size, file.tell() + dtype.itemsize * math.prod(shape)
    if size < expected:
        raise FlowtrainError(f"cannot read {path}: it has {size:,} bytes instead of {expected:,}")
    return shape, by_columns, dtype


def open_rows(path: Path, key: str | None = None, layout: str | None = None) -> Rows:
    """The array at ``path``.

    Args:
        key: its name in an .npz, .h5 or .zarr; None: the only array of two or more dimensions there.
        layout: of a folder of .npy: with N, each file holds examples; without, one. None: one example each, unless the
            files have four axes, or three of which none is that of channels.

    Raises:
        UsageError: ``path`` holds no arrays, or ``key`` is missing or wrong.
        FlowtrainError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if path.is_dir() and suffix != ".zarr":
        if key is not None:
            raise UsageError(f"dataset.key={key}: the arrays of a folder of .npy files have no names")
        files = _npy_files(path)
        if not files:
            raise UsageError(f"dataset.path={path}: a folder without .npy files")
        return FolderRows(path, files, _is_stack(NpyRows(files[0]).shape) if layout is None else "N" in layout)
    if suffix not in SUFFIXES:
        raise UsageError(f"dataset.path={path}: must end in {', '.join(SUFFIXES)}, or be a folder of .npy files")
    if suffix == ".npy":
        if key is not None:
            raise UsageError(f"dataset.key={key}: an .npy file holds a single array, without a name")
        return NpyRows(path)
    with _name_file_in_errors(path):
        arrays = _arrays_in(path)
        if key is None:
            wide = [name for name, shape in arrays.items() if len(shape) > 1]
            if len(wide) != 1:
                raise UsageError(f"dataset.path={path}: choose an array with dataset.key=: {_list(arrays)}")
            (key,) = wide
        if key not in arrays:
            raise UsageError(f"dataset.key={key}: {path} has no such array; it has {_list(arrays)}")
        return _open_member(path, key)


def _list(arrays: dict[str, tuple[int, ...]], most: int = 8) -> str:
    names = [f"{name} {list(shape)}" for name, shape in [*arrays.items()][:most]]
    return ", ".join(names or ["none"]) + (f", … ({len(arrays)})" if len(arrays) > most else "")


def _arrays_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of each array in an .npz, .h5 or .zarr."""
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            return {name: _npz_shape(archive, name) for name in names}
    group, found = _open_group(path), {}
    if path.suffix.lower() == ".zarr":
        members = {"": group} if hasattr(group, "shape") else dict(group.members(max_depth=None))
        return {name: tuple(item.shape) for name, item in members.items() if hasattr(item, "shape")}
    group.visititems(lambda name, item: found.update({name: item.shape} if hasattr(item, "dtype") else {}))
    return {name: tuple(shape or ()) for name, shape in found.items()}


def _open_member(path: Path, key: str) -> Rows:
    if path.suffix.lower() != ".npz":
        group = _open_group(path)
        return SlicedRows(path, group[key] if key else group)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as file:
                file.seek(member.header_offset)
                header = file.read(_LOCAL_HEADER)
                name, extra = struct.unpack("<HH", header[26:30])
            return NpyRows(path, member.header_offset + _LOCAL_HEADER + name + extra)
        if member.file_size > half_of_memory():
            raise UsageError(
                f"{path}: {key} is compressed, so it is read as a whole, and its {member.file_size / 2**30:.1f} GiB"
                " fill more than half of the memory; write it with numpy.savez or as .npy"
            )
    with np.load(path, allow_pickle=False) as archive:
        return HeldRows(path, archive[key])


def check_written(dataset) -> None:
    """Raise FlowtrainError for a dataset of an .h5 file that has a shape but no data: it would be read as zeros."""
    stored = dataset.is_virtual or dataset.external or dataset.id.get_storage_size()
    if dataset.size and not stored:
        shape = list(dataset.shape)
        raise FlowtrainError(f"{dataset.file.filename}: {dataset.name.strip('/')} {shape} was never written")


def half_of_memory() -> int:
    """Half of the machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _npz_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as file:
        return read_npy_header(file)[0]


def _open_group(path: Path):
    """An .h5 file or a .zarr group, open for reading."""
    if path.suffix.lower() == ".zarr":
        import zarr

        return zarr.open(path, mode="r")
    import h5py

    return h5py.File(path, "r")


def _npy_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*.npy") if file.is_file() and not file.name.startswith("."))


def _is_stack(shape: tuple[int, ...]) -> bool:
    """Whether a file of a folder holds many examples: it has four axes, or three of which none is that of channels."""
    return len(shape) > 3 or len(shape) == 3 and not (_is_channels(shape, 0) or _is_channels(shape, 2))


def _is_channels(shape: tuple[int, ...], axis: int) -> bool:
    """Whether an axis of an image looks like its channels: 1, 3 or 4, and fewer than each of the other two sides."""
    others = [side for i, side in enumerate(shape) if i != axis]
    return shape[axis] in (1, 3, 4) and shape[axis] < min(others)


def find_layout(shape: tuple[int, ...], path: Path, layout: str | None = None, event=None) -> str:
    """The meaning of the axes of examples (N, …): NL, NHW, NHWC or NCHW.

    Args:
        layout: what the user says, with or without N; None: found.
        event: the shape (C, H, W) or (L,) that the examples must have; None: any.

    Raises:
        UsageError: it cannot be told, or does not fit.
    """
    fitting = {2: ["NL"], 3: ["NHW"], 4: ["NCHW", "NHWC"]}.get(len(shape), [])
    holds = f"{path} holds examples of shape {list(shape[1:])}"
    if not fitting or min(shape[1:]) < 1:
        raise UsageError(
            f"{holds}: an array must be (N, length), (N, height, width), (N, height, width, channels) or"
            " (N, channels, height, width)"
        )
    if layout is not None:
        layout = layout if layout.startswith("N") else f"N{layout}"
        if layout not in fitting:
            raise UsageError(f"dataset.layout={layout}: {holds}, which can be {' or '.join(fitting)}")
        fitting = [layout]
    elif len(fitting) > 1 and event is None:
        fitting = [one for one, axis in (("NCHW", 0), ("NHWC", 2)) if _is_channels(shape[1:], axis)]
        if len(fitting) != 1:
            raise UsageError(f"{holds}: say which axis is that of the channels, dataset.layout=NCHW or NHWC")
    if event is not None:
        fitting = [one for one in fitting if event_shape(shape, one) == tuple(event)]
        if not fitting:
            raise UsageError(f"{holds}: this model takes {list(event)}")
    return fitting[0]


def event_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape (C, H, W) or (L,) of an example of an array of this shape (N, …)."""
    return shape[1:] if layout in ("NL", "NCHW") else (1, *shape[1:]) if layout == "NHW" else (shape[3], *shape[1:3])


def arrange(rows: np.ndarray, layout: str) -> np.ndarray:
    """Rows (N, …) of an array as (N, C, H, W) or (N, L)."""
    if layout == "NHW":
        return rows[:, None]
    return rows.transpose(0, 3, 1, 2) if layout == "NHWC" else rows


@contextmanager
def _name_file_in_errors(path: Path):
    """Turn what a library raises inside this block into one line that names the file."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = "zarr" if path.suffix.lower() == ".zarr" else "tables"
        raise UsageError(f"{path.suffix} files need more packages: pip install 'flowtrain[{extra}]'") from error
    except FlowtrainError:
        raise
    except Exception as error:  # libraries raise many kinds for a damaged file
        raise FlowtrainError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from error
