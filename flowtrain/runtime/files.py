"""Files that are written whole or not at all, and errors that say what the disk lacks."""

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


class WriteError(FlowtrainError):
    """A disk is full, read-only, or over this user's quota."""


@contextmanager
def convert_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise WriteError for an OSError inside, which writes ``needed`` bytes to ``path``."""
    try:
        yield
    except OSError as error:
        raise write_error(path, needed, error) from error


def write_error(path: Path, needed: int | None, error: OSError) -> WriteError:
    """``error``, which the file system raised for ``path``, with the space needed and the space free."""
    place = Path(path).absolute().parent
    while not place.is_dir():
        place = place.parent
    room = f"{shutil.disk_usage(place).free:,} free"
    if error.errno == errno.EFBIG:
        room += f", at most {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,} a file"
    wanted = "" if needed is None else f"{needed:,} bytes needed, "
    return WriteError(f"{path}: cannot be written ({error.strerror}): {wanted}{room}")


def temporary(path: Path) -> Path:
    """The temporary file for ``path``: beside it, under a name that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write(path: Path, data: bytes) -> None:
    """Write a file atomically: the old ``path`` stays until all of ``data`` is on disk. Raises WriteError."""
    new = temporary(path)
    with convert_errors(path, len(data)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(data)
            os.replace(new, path)
        finally:
            discard(new)


def write_json(path: Path, value) -> None:
    """Write ``value`` as JSON, atomically. Raises WriteError."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def append(file, data: bytes) -> None:
    """Append all of ``data`` to an unbuffered binary file, or nothing. Raises WriteError."""
    size = os.fstat(file.fileno()).st_size
    with convert_errors(Path(file.name), len(data)):
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def discard(path: Path) -> None:
    """Remove a temporary file, if it exists; on a read-only disk, the next run removes it."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def remove_temporary(directory: Path) -> None:
    """Remove the temporary files in ``directory`` of processes that were killed while they wrote."""
    for path in Path(directory).glob(".*.tmp"):
        discard(path)
