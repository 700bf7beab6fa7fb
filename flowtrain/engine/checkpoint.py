"""Checkpoints: plain containers in torch's archive, written whole or not at all, with their own digest.

The SHA-256 of the archive is kept in its zip comment: one file, one rename, and a lone file verifies itself while
``torch.load`` opens it as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch

from flowtrain.errors import FlowtrainError, Refused

_MARK = b"flowtrain sha256 "
_COMMENT = len(_MARK) + 64  # mark and hexadecimal digest


def save(state: dict, path: Path) -> None:
    """Write ``state`` to ``path`` so that at any moment either the old file or the new one is there, complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        with open(temporary, "r+b") as file:
            comment = _MARK + _digest(file, temporary.stat().st_size).encode()
            file.seek(-2, os.SEEK_END)  # the archive ends with the length of its comment, 0 so far
            file.write(len(comment).to_bytes(2, "little") + comment)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_last(state: dict, directory: Path) -> Path:
    """Write ``last.pt``, keeping the one before as ``previous.pt``."""
    last, previous = Path(directory) / "last.pt", Path(directory) / "previous.pt"
    if last.exists():
        link = previous.with_name(f".previous.{os.getpid()}.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(last, link)  # last.pt stays in its place until the new one replaces it
        except OSError:  # a file system without hard links
            shutil.copy2(last, link)
        os.replace(link, previous)
    save(state, last)
    return last


def read(path, map_location="cpu") -> dict:
    """The state in ``path``, after its digest agreed.

    Raises:
        FlowtrainError: the file is damaged, or no flowtrain checkpoint.
    """
    path = Path(path)
    check(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # whatever an archive with a right digest may still hold
        raise FlowtrainError(f"{path}: not a flowtrain checkpoint ({type(error).__name__})") from error


def check(path: Path) -> None:
    """Compare the archive with the digest in its comment.

    Raises:
        FlowtrainError: they differ, or there is none.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size >= 2 and file.read(2) != b"PK":  # how the archives of torch.save begin
                raise Refused(f"{path}: not a flowtrain checkpoint")
            file.seek(max(0, size - _COMMENT))
            comment = file.read()
            found = _digest(file, size - _COMMENT) if comment.startswith(_MARK) else None
    except OSError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error.strerror})") from error
    if found is None:
        raise FlowtrainError(f"{path}: no flowtrain checkpoint, or its end is missing ({size} bytes)")
    expected = comment[len(_MARK) :].decode("ascii", "replace")
    if found != expected:
        raise FlowtrainError(f"{path}: damaged; its SHA-256 is {found}, {expected} was written")


def verify(path) -> bool:
    try:
        check(Path(path))
    except FlowtrainError:
        return False
    return True


def read_config(path) -> dict:
    """The configuration in a checkpoint, as plain containers; the tensors stay in the file."""
    path = Path(path)
    check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["config"]
    except Exception as error:
        raise FlowtrainError(f"{path}: not a flowtrain checkpoint ({type(error).__name__})") from error


def _digest(file, length: int) -> str:
    """Of the first ``length`` bytes, the length of the comment, their last two, counted as 0."""
    file.seek(0)
    digest = hashlib.sha256()
    left = length - 2
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
