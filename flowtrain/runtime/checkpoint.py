"""Checkpoints: plain containers in torch's archive, written whole or not at all, with their own digest.

The SHA-256 of the archive is kept in its zip comment: one file, one rename, and a lone file verifies itself while
``torch.load`` opens it as it is.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import files, safetensors_file

FORMAT = 2  # of the state; raised by a version that cannot read what the one before wrote
_MARK = b"flowtrain sha256 "
_COMMENT = len(_MARK) + 64  # mark and hexadecimal digest
_MEMBER = re.compile(r"[\w.-]+(/[\w.-]+)+")
_DEPTH = 64  # of containers: a configuration's own limit is lower


def save(state: dict, path: Path, kept: Path | None = None) -> None:
    """Write ``state`` and its format to ``path``: at any moment either the old file or the new one is there, complete.

    The old one goes to ``kept``, but only when the new one stands in its place: what was at ``kept`` is replaced last.

    Raises:
        WriteError: the disk does not take it; then all is as it was.
    """
    path = Path(path)
    new, spare = files.temporary(path), kept and files.temporary(kept)
    archive = _Archive(new)
    try:
        torch.save({"format": FORMAT, **state}, archive)
        archive.finish()
        if kept and path.exists():
            _duplicate(path, spare)
        os.replace(new, path)
        if kept and spare.exists():
            os.replace(spare, kept)
        _sync_directory(path.parent)
    except OSError as error:
        raise files.write_error(path, archive.size, error) from error
    finally:
        archive.close()
        for left in filter(None, (new, spare)):
            files.discard(left)


def save_last(state: dict, directory: Path) -> Path:
    """Write ``last.pt``, keeping the one before as ``previous.pt``."""
    last = Path(directory) / "last.pt"
    save(state, last, kept=last.with_name("previous.pt"))
    return last


class _Archive:
    """What torch.save writes into: a file that it digests and whose ``size`` it counts, the comment's included.

    The writer in C++ must come to its end, or it hides why it did not: :meth:`finish` raises the first error.
    """

    def __init__(self, path: Path):
        self.size, self.file, self.error, self.digest = _COMMENT, None, None, hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "wb")
        except OSError as error:
            self.error = error

    def write(self, data) -> int:
        self.size += len(data)
        if self.error is None:
            self.digest.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        """Add the comment, and see all to the disk."""
        if self.error is not None:
            raise self.error
        comment = _MARK + self.digest.hexdigest().encode()
        self.file.seek(-2, os.SEEK_END)  # the archive ends with the length of its comment, 0 so far
        self.file.write(len(comment).to_bytes(2, "little") + comment)
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # of what a full disk did not take
                self.file.close()


def _duplicate(path: Path, spare: Path) -> None:
    files.discard(spare)
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        shutil.copy2(path, spare)


def read(path, mmap: bool = False) -> dict:
    """The state in ``path``, after its digest agreed: plain containers, numbers, texts and tensors on the CPU, whoever
    wrote it.

    ``mmap`` leaves the tensors in the file. A file that ends in .safetensors has weights and a configuration alone.

    Raises:
        FlowtrainError: the file is damaged, no flowtrain checkpoint, or one of another format.
    """
    path = Path(path)
    if path.suffix == safetensors_file.SUFFIX:
        return safetensors_file.read(path)
    try:
        with open(path, "rb") as file:  # one file, though another process may put a newer one in its place meanwhile
            _check(path, file)
            _check_members(file)
            file.seek(0)
            source = f"/dev/fd/{file.fileno()}" if mmap else file
            with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that are refused next
                state = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        _check_plain(state)
        _check_format(path, state.pop("format", None))
    except FlowtrainError:
        raise
    except OSError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever an archive with a right digest may still hold
        reason = str(error) if type(error) is ValueError else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds objects, not data alone"
        raise FlowtrainError(f"{path}: not a flowtrain checkpoint ({reason})") from error
    return state


def _check_members(file) -> None:
    """What torch.save writes: stored as it is, so that no file unpacks to more than its own size, under plain names.

    Raises ValueError.
    """
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(archive.comment) != _COMMENT:  # then another reader might find other members
            raise ValueError("its digest is not its comment")
    names = [member.filename for member in members]
    if len({*names}) < len(names):
        raise ValueError("two of its members have one name")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError("a member of it is compressed")
        if not _MEMBER.fullmatch(member.filename) or ".." in member.filename.split("/"):
            raise ValueError(f"a member of it is named {member.filename[:60]!r}")
        if member.external_attr >> 28:  # a kind of file, such as a link
            raise ValueError(f"its member {member.filename} is no plain file")


def _check_plain(state) -> None:
    """ValueError for what is neither a container of data nor data, nested too deeply, or a tensor of more numbers than
    the file has."""
    if type(state) is not dict:
        raise ValueError(f"it is a {type(state).__name__}")
    todo, seen = [(state, 1)], set()
    while todo:
        value, depth = todo.pop()
        kind = type(value)
        if kind is torch.Tensor:
            if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
                raise ValueError("it holds a tensor that is no plain array")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"it declares a tensor of shape {list(value.shape)}, larger than its data")
        elif kind in (dict, OrderedDict, list, tuple):
            if depth > _DEPTH:
                raise ValueError("it is nested too deeply")
            if id(value) not in seen:  # what occurs twice is looked at once: no small file takes for ever
                seen.add(id(value))
                parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
                todo += [(part, depth + 1) for part in parts]
        elif kind not in (str, int, float, bool, type(None)):
            raise ValueError(f"it holds a {kind.__name__}")


def _check_format(path: Path, found) -> None:
    if type(found) is not int:
        raise ValueError("it does not say its format")
    if found != FORMAT:
        raise FlowtrainError(f"{path}: its format is {found}; this version of flowtrain reads format {FORMAT}")


def check(path: Path) -> None:
    """Compare the archive with the digest in its comment.

    Raises:
        FlowtrainError: they differ, or there is none.
    """
    try:
        with open(path, "rb") as file:
            _check(path, file)
    except OSError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error.strerror})") from error


def digest(path) -> str:
    """The SHA-256 that a checkpoint's comment states; of a file of safetensors, its own.

    Raises:
        FlowtrainError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if Path(path).suffix == safetensors_file.SUFFIX:
                return hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(-_COMMENT, os.SEEK_END)
            return file.read()[len(_MARK) :].decode("ascii", "replace")
    except OSError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error.strerror})") from error


def _check(path: Path, file) -> None:
    size = os.fstat(file.fileno()).st_size
    head = file.read(2)
    file.seek(max(0, size - _COMMENT))
    comment = file.read()
    if not comment.startswith(_MARK):
        if size >= 2 and head != b"PK":  # how the archives of torch.save begin
            raise FlowtrainError(f"{path}: not a flowtrain checkpoint")
        raise FlowtrainError(
            f"{path}: no flowtrain checkpoint, or its end is missing ({size} bytes): its SHA-256 is "
            f"{_digest(file, size)}, what was written is not there"
        )
    found, expected = _digest(file, size - _COMMENT), comment[len(_MARK) :]
    if found.encode() != expected:
        expected = re.sub(rb"[^0-9a-f]", b"?", expected).decode()  # none of its bytes moves a cursor
        raise FlowtrainError(f"{path}: damaged; its SHA-256 is {found}, {expected} was written")


def read_config(path) -> dict:
    """The configuration in a checkpoint, as plain containers; the tensors stay in the file."""
    config = read(path, mmap=True).get("config")
    if config is None:
        raise FlowtrainError(f"{path}: not a flowtrain checkpoint (it holds no configuration)")
    return config


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


def load_weights(flow: nn.Module, state: dict, weights: str = "auto") -> str:
    """Load a checkpoint's averaged (``ema``) or ``raw`` weights, ``auto`` the averaged where there are; says which."""
    if weights == "auto":
        weights = "ema" if state["ema"] else "raw"
    if weights == "ema" and not state["ema"]:
        raise UsageError("weights=ema: this checkpoint has none; weights=raw")
    try:
        flow.load_state_dict(state["ema" if weights == "ema" else "model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise FlowtrainError(f"the checkpoint's weights do not fit its model: {reason} …") from None
    return weights
