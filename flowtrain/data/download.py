"""Downloads of missing files: by one process for all, complete or not at all."""

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
    """Run ``action`` in process 0 while the others wait. An exception there is raised in every process."""
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
    """Download ``files`` into ``root``: ``download(folder)`` fills a temporary folder in it, then the files move.

    So a file is complete or absent. Archives can unpack only below the temporary folder (PEP 706, filter "data").
    Raises whatever ``download`` raises.
    """
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".download-", dir=root)
    patience, unpacking = socket.getdefaulttimeout(), tarfile.TarFile.extraction_filter
    try:
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        socket.setdefaulttimeout(30)  # seconds without an answer; urllib has no limit of its own
        with contextlib.redirect_stdout(sys.stderr):  # stdout may carry JSON
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
                root.rmdir()  # only if it is empty
