"""Arrays: .npy, .npz and .h5. A 2-D array has columns c0, c1, …, a structured one has those of its fields."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flowtrain.data.array_files import check_written, read_array_header, read_npy_header
from flowtrain.data.tables.block import (
    LEAVE_OUT,
    Block,
    Kind,
    Reader,
    boolean_texts,
    check_options,
    check_width,
    join_names,
    name_columns,
    nearest,
    number_texts,
    rows_of_block,
    time_texts,
)
from flowtrain.errors import FlowtrainError, UsageError

KINDS: dict[str, Kind] = {**dict.fromkeys("iufm", "number"), "b": "boolean", "M": "time", "U": "text", "S": "text"}


class Array:
    """The array in an .npy file, of which ``array[start:stop]`` reads slices. It is not mapped into memory, since that
    kills the process without a message when another process truncates the file.

    Raises:
        FlowtrainError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self.shape, is_fortran, self.dtype = read_array_header(path, file)
            self.start = file.tell()
        self.ndim = len(self.shape)
        self.by_columns = is_fortran and self.ndim > 1

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, stop, _ = rows.indices(len(self))
        count, each = max(stop - first, 0), math.prod(self.shape[1:])
        with open(self.path, "rb") as file:
            if self.by_columns:
                parts = [self._read(file, place * len(self) + first, count, first, 1) for place in range(each)]
                return np.array(parts, self.dtype).reshape(*self.shape[:0:-1], count).transpose()
            found = self._read(file, first * each, count * each, first, each)
        return found.reshape(count, *self.shape[1:])

    def _read(self, file, start: int, count: int, row: int, each: int) -> np.ndarray:
        """``count`` numbers from number ``start`` on, which is in ``row``; ``each`` row has so many."""
        file.seek(self.start + self.dtype.itemsize * start)
        found = np.fromfile(file, self.dtype, count)
        if len(found) < count:
            row += len(found) // each + 1
            raise FlowtrainError(f"cannot read {self.path} from row {row} on: the file is truncated")
        return found


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is stored by columns, and dtype, from the header of an array in the format of .npy."""
    shape, is_fortran, dtype = read_npy_header(file)
    if dtype.hasobject or dtype.itemsize == 0 and math.prod(shape):
        raise ValueError("it holds objects")
    return shape, is_fortran, dtype


class _Field:
    """A column of an array: a field of its dtype, and a place in its second axis or in those of the field."""

    def __init__(self, name: str, dtype: np.dtype, field: str | None = None, place: int | None = None):
        self.name, self.dtype, self.field, self.place = name, dtype, field, place

    def of(self, part: np.ndarray) -> np.ndarray:
        part = part if self.field is None else part[self.field]
        return part if self.place is None else part.reshape(len(part), -1)[:, self.place]


def fields_of(shape: Sequence[int], dtype: np.dtype) -> list[_Field]:
    """The columns of an array. Raises UsageError where it is no table."""
    if dtype.names and len(shape) == 1:
        fields = []
        for name in dtype.names:
            base, inner = dtype[name].subdtype or (dtype[name], ())
            check_width(math.prod(inner))
            places = range(math.prod(inner)) if inner else [None]
            fields += [_Field(name if place is None else f"{name}_{place}", base, name, place) for place in places]
        return fields
    if dtype.names is None and len(shape) == 2:
        check_width(shape[1])
        return [_Field(f"c{i}", dtype, place=i) for i in range(shape[1])]
    if dtype.names is None and len(shape) == 1:
        return [_Field("c0", dtype)]
    raise UsageError(f"it holds {dtype} {list(shape)}: must be numbers (rows, columns)")


class ArrayReader(Reader):
    """Columns of one array or of several that are as long."""

    def prepare(self, parts: Mapping[str, tuple[Sequence[int], np.dtype]], text: Sequence[str]) -> None:
        """Set the names; ``parts`` are the shapes and dtypes of arrays. If there are several, each is one column."""
        if len(parts) == 1:
            ((part, (shape, dtype)),) = parts.items()
            fields = [(part, field) for field in fields_of(shape, dtype)]
        else:
            fields = [(part, _Field(part, dtype)) for part, (_, dtype) in parts.items()]
        self.names, self.notes = name_columns(field.name for _, field in fields)
        self._fields = dict(zip(self.names, fields))
        self.text = {*text}

    def parts(self, names: Sequence[str], rows: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the named arrays in slices of ``rows``."""
        raise NotImplementedError

    def kinds(self, names):
        return {name: self._kind(name) for name in names}

    def _kind(self, name: str) -> Kind:
        dtype = self._fields[name][1].dtype
        kind = "text" if _is_text(dtype) else KINDS.get(dtype.kind)
        if kind is None or dtype.names:
            raise UsageError(f"column '{name}' holds {dtype}: write it as numbers, times or text; {LEAVE_OUT}")
        return "text" if name in self.text else kind

    def blocks(self, names: Sequence[str]) -> Iterator[Block]:
        kinds = self.kinds(names)
        wanted = list(dict.fromkeys(self._fields[name][0] for name in names))
        width = sum(part in wanted for part, _ in self._fields.values())
        for parts in self.parts(wanted, rows_of_block(width)):
            block = {}
            for name in names:
                part, field = self._fields[name]
                block[name] = _values(field.of(parts[part]), kinds[name] == "text")
            yield block


def _is_text(dtype: np.dtype) -> bool:
    """Whether it is the text of an HDF5 file."""
    return dtype.kind == "O" and (dtype.metadata or {}).get("vlen") in (str, bytes)


def _values(values: np.ndarray, as_text: bool) -> np.ndarray:
    """A column of an array as one of a block."""
    kind = values.dtype.kind
    if kind in "USO":
        texts = [text.decode() if isinstance(text, bytes) else text for text in values.tolist()]
        return np.array([text or None for text in texts] + [None], dtype=object)[:-1]
    if kind == "b":
        return boolean_texts(values)
    if kind == "M":
        values = values.astype("datetime64[us]")
        return time_texts(values) if as_text else values
    if kind == "m":
        missing = np.isnat(values)
        values = np.where(missing, np.nan, values / np.timedelta64(1, "s"))
    if as_text and kind in "iu":
        distinct, places = np.unique(values, return_inverse=True)
        return np.array([str(value) for value in distinct.tolist()] + [None], dtype=object)[places]
    with np.errstate(invalid="ignore"):  # a signalling NaN, which the caller refuses
        values = values.astype(np.float64)
    return number_texts(values) if as_text else values


class Npy(ArrayReader):
    """An array in an .npy file."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str]):
        check_options(read, (), ".npy files", {})
        self.array = Array(path)
        self.prepare({"": (self.array.shape, self.array.dtype)}, text)

    def parts(self, names, rows):
        for start in range(0, len(self.array), rows):
            yield {"": self.array[start : start + rows]}


class Npz(ArrayReader):
    """An array of an .npz file, or all of them if they are equally long and of one dimension."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str], key: str | None):
        check_options(read, (), ".npz files", {})
        self.path, found = path, {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as file:
                        found[member.removesuffix(".npy")] = _header_or_none(file)
        self.chosen = choose_arrays(found, key)
        self.prepare(self.chosen, text)

    def parts(self, names, rows):
        with zipfile.ZipFile(self.path) as archive:
            streams = [self._slices(archive, name, rows) for name in names]
            for parts in zip(*streams):
                yield dict(zip(names, parts))

    def _slices(self, archive: zipfile.ZipFile, name: str, rows: int) -> Iterator[np.ndarray]:
        with archive.open(f"{name}.npy") as file:
            shape, is_fortran, dtype = _read_header(file)
            each = math.prod(shape[1:])
            if is_fortran and len(shape) > 1:
                whole = np.frombuffer(_read_exactly(file, dtype.itemsize * math.prod(shape)), dtype)
                whole = whole.reshape(shape, order="F")
                yield from (whole[start : start + rows] for start in range(0, shape[0], rows))
                return
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = _read_exactly(file, dtype.itemsize * each * count)
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _header_or_none(file) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and dtype; None for an array of objects."""
    try:
        shape, _, dtype = _read_header(file)
    except ValueError:
        return None
    return shape, dtype


def _read_exactly(file, size: int) -> np.ndarray:
    """``size`` bytes, of which there is never a second copy."""
    data, at = np.empty(size, np.uint8), 0
    while at < size:
        piece = file.read(min(2**24, size - at))
        if not piece:
            raise ValueError("the array is truncated")
        data[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return data


class Hdf5(ArrayReader):
    """A dataset of an .h5 file, or the columns of a group: datasets that are equally long and of one dimension."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str], key: str | None):
        import h5py

        check_options(read, (), ".h5 files", {})
        self.path, found = path, {}

        def add(name: str, item) -> None:
            if isinstance(item, h5py.Dataset) and item.shape:
                found[name] = (item.shape, item.dtype)

        with h5py.File(path) as archive:
            archive.visititems(add)
        key = key and key.strip("/")
        group = {name.removeprefix(f"{key}/"): form for name, form in found.items() if name.startswith(f"{key}/")}
        self.group = f"{key}/" if group else ""
        self.chosen = choose_arrays(group, None) if group else choose_arrays(found, key)
        self.prepare(self.chosen, text)

    def parts(self, names, rows):
        import h5py

        with h5py.File(self.path) as archive:
            sets = {name: archive[self.group + name] for name in names}
            for dataset in sets.values():
                check_written(dataset)
            for start in range(0, len(sets[names[0]]), rows):
                yield {name: item[start : start + rows] for name, item in sets.items()}


def choose_arrays(found: Mapping[str, tuple | None], key: str | None) -> dict[str, tuple]:
    """The array called ``key``; without a key the only one, or all if they are equally long and of one dimension."""
    usable = {name: form for name, form in found.items() if form is not None and len(form[0]) > 0}
    if key is not None:
        if key not in usable:
            near = nearest(key, list(usable))
            hint = f"did you mean '{near}'?" if near else f"there are {join_names(list(usable))}"
            raise UsageError(f"dataset.key={key}: there is no such array of numbers; {hint}")
        return {key: usable[key]}
    if not usable:
        raise UsageError("it holds no array of numbers")
    shapes = {tuple(shape) for shape, _ in usable.values()}
    columns = len(shapes) == 1 and len(*shapes) == 1 and not any(dtype.names for _, dtype in usable.values())
    if len(usable) > 1 and not columns:
        raise UsageError(f"it holds several arrays; choose one with dataset.key=…: {join_names(list(usable))}")
    return usable
