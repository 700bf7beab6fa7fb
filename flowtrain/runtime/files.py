"""Files that stand whole or not at all, and one line of what a disk lacks that does not take them."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flowtrain.errors import FlowtrainError


class Unwritable(FlowtrainError):
    """A disk that is full, may only be read, or gives this user no more."""


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise Unwritable for the OSError of what is written within it to ``path``, of ``needed`` bytes."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, needed, error) from error


def unwritable(path: Path, needed: int | None, error: OSError) -> Unwritable:
    place = Path(path).absolute().parent
    while not place.is_dir():
        place = place.parent
    room = f"{shutil.disk_usage(place).free:,} free"
    if error.errno == errno.EFBIG:
        room += f", of which a file may have {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,}"
    wanted = "" if needed is None else f"{needed:,} bytes needed, "
    return Unwritable(f"{path}: cannot be written ({error.strerror}): {wanted}{room}")


def temporary(path: Path) -> Path:
    """Where what will be ``path`` is written: beside it, under a name that no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write(path: Path, data: bytes) -> None:
    """Write a file in one move: whatever stood at ``path`` stays until all of ``data`` is there. Raises Unwritable."""
    new = temporary(path)
    with writing(path, len(data)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(data)
            os.replace(new, path)
        finally:
            discard(new)


def write_json(path: Path, value) -> None:
    """``value`` as text, in one move. Raises Unwritable."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def append(file, data: bytes) -> None:
    """Add ``data`` to an unbuffered binary file, or nothing. Raises Unwritable."""
    size = os.fstat(file.fileno()).st_size
    with writing(Path(file.name), len(data)):
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def discard(path: Path) -> None:
    """Remove a temporary file, if it is there; on a disk that lets nothing be removed, the next run will."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove the temporary files that processes killed while they wrote left in ``directory``."""
    for path in Path(directory).glob(".*.tmp"):
        discard(path)
