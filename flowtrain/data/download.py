"""Fetching missing files: by one process for all, complete or not at all."""

import contextlib
import os
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist


def on_first_rank(action: Callable[[], None]) -> None:
    """Runs ``action`` in process 0 while the others wait; what it raises is raised in all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return action()
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


def fetch(root: Path, files: Iterable[str], download: Callable[[str], None]) -> None:
    """``download(folder)`` fills a temporary folder beside the others; then each of ``files`` moves to ``root``.

    A file is thus there as a whole or not at all, and an archive unpacks below that folder only (PEP 706's "data").
    Raises what ``download`` raises.
    """
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".download-", dir=root)
    patience, unpacking = socket.getdefaulttimeout(), tarfile.TarFile.extraction_filter
    try:
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        socket.setdefaulttimeout(30)  # seconds without an answer; urllib itself would wait for ever
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be wanted for JSON alone
            download(temporary)
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary, file), root / file)
    finally:
        socket.setdefaulttimeout(patience)
        tarfile.TarFile.extraction_filter = unpacking
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                root.rmdir()  # only if nothing has come
