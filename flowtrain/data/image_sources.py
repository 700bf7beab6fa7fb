"""Where image files lie, listed and opened by name: a folder, a .zip, one or several .tar, a column of a .parquet."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from flowtrain.data.array_files import half_of_memory
from flowtrain.data.labels import list_classes, printable
from flowtrain.errors import FlowtrainError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
MOST_LABEL_BYTES = 1024  # of a .cls
MOST_IMAGE_BYTES = 2**28  # of an image in a .tar
MOST_UNPACKED = 20  # times the size of a .parquet: images are compressed already
PARQUET_ROWS = 256  # that are read at once
MOST_SHARDS = 100_000


class ListingTime:
    """The time at which a run listed its images."""

    SLACK = 2.0  # seconds of error allowed in a file server's clock

    def __init__(self):
        self.seconds = time.time()

    def check_unchanged(self, file: BinaryIO) -> BinaryIO:
        """Return ``file``, or raise ValueError if it was written since. A time in the future is ignored."""
        written = os.fstat(file.fileno()).st_mtime
        if self.seconds + self.SLACK < written < time.time() + self.SLACK:
            file.close()
            raise ValueError("it has changed since the run began")
        return file


class Source:
    """Images by name.

    Attributes:
        path: of the folder or file.
        names: sorted.
        labels: the label of each image, by its name; None where the images lie in class folders, if anywhere.
    """

    path: Path
    names: Sequence[str]
    labels: dict[str, str] | None = None

    def location(self, name: str) -> str:
        """Where an image is, for a message."""
        return f"{printable(str(self.path))}:{printable(name)}"

    def open(self, name: str) -> BinaryIO:
        """Open an image for reading. Raises OSError or ValueError."""
        raise NotImplementedError


class Folder(Source):
    """The images under a folder, named by their relative paths, sorted."""

    def __init__(self, path: Path):
        self.path, self.listed_at, names, visited = path, ListingTime(), [], set()
        try:
            for here, folders, files in os.walk(path, followlinks=True, onerror=_raise):
                identity = os.stat(here).st_dev, os.stat(here).st_ino
                if identity in visited:  # a link to a parent folder
                    folders.clear()
                    continue
                visited.add(identity)
                names += [Path(here, file).relative_to(path).as_posix() for file in files if _is_image(file)]
        except OSError as error:
            raise FlowtrainError(f"cannot list {printable(str(error.filename or path))}: {error.strerror}") from error
        self.names = sorted(names)

    def location(self, name):
        return printable(str(self.path / name))

    def open(self, name):
        return self.listed_at.check_unchanged(open(self.path / name, "rb"))


class Zip(Source):
    """The images in a .zip, read without unpacking it."""

    def __init__(self, path: Path):
        self.path, self.listed_at, self._archive, self._pid = path, ListingTime(), None, None
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = sorted(name for name in archive.namelist() if _is_image(name))
        except Exception as error:  # zipfile raises many kinds for a damaged archive
            raise FlowtrainError(f"cannot read {path}: {error}") from error

    def open(self, name):
        if self._pid != os.getpid():  # a worker must not share its parent's file position
            self._archive, self._pid = zipfile.ZipFile(self.path), os.getpid()
        self.listed_at.check_unchanged(self._archive.fp)
        return self._archive.open(name)

    def __getstate__(self):
        return self.__dict__ | {"_archive": None, "_pid": None}


class Tar(Source):
    """The images in an uncompressed .tar, read without unpacking it; a compressed one allows no random access. A member
    of the name of an image that ends in .cls holds its label (the WebDataset format)."""

    def __init__(self, path: Path):
        self.path, self.listed_at, members, labels = path, ListingTime(), [], {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isfile() and not member.issparse() and _is_image(member.name):
                        members.append(member)
                    elif member.isfile() and member.name.endswith(".cls") and member.size <= MOST_LABEL_BYTES:
                        labels[_key(member.name)] = archive.extractfile(member).read().decode("utf-8").strip()
        except Exception as error:  # tarfile raises many kinds for a damaged archive
            raise FlowtrainError(f"cannot read {path} as an uncompressed .tar: {error}") from error
        self._places = {member.name: (member.offset_data, member.size) for member in members}
        self.names = sorted(self._places)
        if labels:
            self.labels = {name: labels[_key(name)] for name in self.names if _key(name) in labels}

    def open(self, name):
        offset, size = self._places[name]
        if size > MOST_IMAGE_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than the {MOST_IMAGE_BYTES:,} allowed")
        with open(self.path, "rb") as file:
            self.listed_at.check_unchanged(file).seek(offset)
            return io.BytesIO(file.read(size))


class Tars(Source):
    """The images of several .tar, each named by its archive and its name there."""

    def __init__(self, path: Path, archives: Sequence[Path]):
        self.path = path
        self._tars = {archive.name: Tar(archive) for archive in archives}
        self.names = sorted(f"{tar}/{name}" for tar, images in self._tars.items() for name in images.names)
        self.labels = {
            f"{tar}/{name}": label
            for tar, images in self._tars.items()
            for name, label in (images.labels or {}).items()
        }

    def location(self, name):
        tar, _, rest = name.partition("/")
        return self._tars[tar].location(rest)

    def open(self, name):
        tar, _, rest = name.partition("/")
        return self._tars[tar].open(rest)


class Parquet(Source):
    """The images in a column of one or several .parquet files: bytes, or the struct of bytes and path that Hugging Face
    writes. They are named by file and row, from 0, and held in memory as they are, undecoded.

    Args:
        path: a file or a folder.
        label: the column of labels; None: the one called label, if any.
    """

    def __init__(self, path: Path, files: Sequence[Path], label: str | None = None):
        self.path, self._columns = path, {}
        size, most = sum(file.stat().st_size for file in files), half_of_memory()
        if size > most:
            raise UsageError(
                f"{path}: {size / 2**30:.1f} GiB of images would fill more than half of the memory; unpack them into a"
                " folder or .tar files"
            )
        self.names, labels = [], {}
        for file in files:
            images, texts = _read_parquet(file, label)
            self._columns[file.name] = images
            names = [f"{file.name}/{row}" for row in range(len(images))]
            self.names += names
            labels |= dict(zip(names, texts, strict=True)) if texts is not None else {}
        self.labels = labels

    def open(self, name):
        file, _, row = name.rpartition("/")
        found = self._columns[file][int(row)].as_py()
        found = found["bytes"] if isinstance(found, dict) else found
        if found is None:
            raise ValueError("it is missing")
        return io.BytesIO(found)


def _read_parquet(file: Path, label: str | None):
    """The images of a .parquet as a pyarrow array, and their labels as text or None."""
    try:
        from pyarrow import parquet

        schema = parquet.read_schema(file)
        image = _image_column(file, schema)
        if label is not None and label not in schema.names:
            raise UsageError(f"dataset.labels={label}: {file} has no such column; it has {list_classes(schema.names)}")
        label = label or ("label" if "label" in schema.names else None)
        table = _read_within(file, schema, [image, *([label] if label else [])])
        if label is None:
            return table[image], None
        texts = table[label].to_pylist()
        if None in texts:
            raise UsageError(f"{file}: row {texts.index(None)} has no {label}")
        names = _class_names(schema, label)
        return table[image], [str(names[text] if names and isinstance(text, int) else text) for text in texts]
    except ModuleNotFoundError as error:
        raise UsageError(".parquet files need more packages: pip install 'flowtrain[tables]'") from error
    except FlowtrainError:
        raise
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise FlowtrainError(f"cannot read {file}: {' '.join(str(error).split())[:300]}") from error


def _read_within(file: Path, schema, columns: list[str]):
    """Columns of a .parquet as a table. A value that a file repeats is stored once there but many times in memory, so
    UsageError is raised where that is far more than the file."""
    import pyarrow as pa
    from pyarrow import parquet

    most = min(half_of_memory(), max(2**30, MOST_UNPACKED * file.stat().st_size))
    with parquet.ParquetFile(file) as opened:
        batches, size = [], 0
        for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
            batches.append(batch)
            size += batch.nbytes
            if size > most:
                raise UsageError(f"{file} unpacks to more than {most / 2**30:.1f} GiB of images; write each image once")
    return pa.Table.from_batches(batches, None if batches else pa.schema([schema.field(name) for name in columns]))


def _image_column(file: Path, schema) -> str:
    """The name of the column that holds images."""
    from pyarrow import types

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field.name for field in schema if holds_bytes(field.type)]
    chosen = [name for name in found if name in ("image", "img")] or found
    if len(chosen) != 1:
        what = f"several columns of bytes ({', '.join(chosen)})" if chosen else "no column of bytes"
        raise UsageError(f"{file} has {what}: the images must be in a single one, or in one called image")
    return chosen[0]


def _class_names(schema, label: str) -> list[str]:
    """The names of classes that Hugging Face records for a column of numbers; [] without any."""
    record = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return record.get("info", {}).get("features", {}).get(label, {}).get("names") or []


def find_images(path: Path, labels: str | None = None) -> Source:
    """List the images in a folder, a .zip, one or several .tar, or one or several .parquet.

    Args:
        path: may name several .tar, as in shard-{000..010}.tar. A folder without image files may hold .tar or .parquet.
        labels: of a .parquet, the column of labels.

    Raises:
        UsageError: ``path`` is something else.
        FlowtrainError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if labels is not None and suffix != ".parquet" and not _files_in(path, ".parquet"):
        raise UsageError(f"dataset.labels={labels}: is the name of a column of a .parquet; {path} is none")
    if path.is_dir():
        folder = Folder(path)
        tars, tables = (_files_in(path, end) if not folder.names else [] for end in (".tar", ".parquet"))
        return Tars(path, tars) if tars else Parquet(path, tables, labels) if tables else folder
    if not path.exists() and (archives := expand_braces(path)):
        for archive in archives:
            if not archive.is_file():
                raise UsageError(f"dataset.path={path}: {archive} does not exist")
        return Tars(path, archives)
    if suffix == ".zip":
        return Zip(path)
    if suffix == ".tar":
        return Tar(path)
    if suffix == ".parquet":
        return Parquet(path, [path], labels)
    raise UsageError(f"{path} is neither a folder nor a .zip, .tar or .parquet of images")


def expand_braces(path: Path) -> list[Path]:
    """The paths that one with {000..010} stands for; [] without braces."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", str(path))
    if len(parts) == 1:
        return []
    texts, ranges = parts[::3], zip(parts[1::3], parts[2::3])
    numbers = [[f"{i:0{len(a)}}" for i in range(int(a), min(int(b), int(a) + MOST_SHARDS) + 1)] for a, b in ranges]
    return [
        Path("".join(itertools.chain(*zip(texts, chosen), texts[-1:])))
        for chosen in itertools.islice(itertools.product(*numbers), MOST_SHARDS)
    ]


def _files_in(path: Path, suffix: str) -> list[Path]:
    """The files of a folder with this ending, sorted."""
    if not path.is_dir():
        return []
    return sorted(file for file in path.iterdir() if file.suffix.lower() == suffix and not file.name.startswith("."))


def _key(name: str) -> str:
    """What the members of a .tar that belong together share: the name up to the first dot."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _is_image(name: str) -> bool:
    hidden = os.path.basename(name).startswith(".") or name.startswith("__MACOSX/")
    return name.lower().endswith(SUFFIXES) and not hidden


def _raise(error: OSError) -> None:
    raise error
