"""Where the data of a run lie: ``data.json`` in its run directory. A checkpoint does not say: it may go to others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from flowtrain.data.dataset import Dataset
from flowtrain.data.image_sources import expand_braces
from flowtrain.data.labels import printable
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import files

log = logging.getLogger("flowtrain")

NAME = "data.json"
KEYS = ("root", "path")  # of dataset, that a run remembers
HEAD = 2**20  # bytes of a file in its digest


@dataclass(frozen=True)
class Places:
    """Attributes:
    root, path: ``dataset.root`` and ``dataset.path``, absolute.
    size: bytes of the file at ``path``, or of all files where it has braces; or entries of the folder.
    head: SHA-256 of the file's first ``HEAD`` bytes, shared out among several; or of the names of the folder's entries.
    """

    root: str
    path: str | None
    size: int | None
    head: str | None


def record(run_dir: str, dataset: Dataset) -> None:
    """Write where the data of a run lie into its directory."""
    path = None if dataset.path is None else os.path.abspath(dataset.path)
    size, head = (None, None) if path is None else _fingerprint(path)
    files.write_json(Path(run_dir) / NAME, asdict(Places(os.path.abspath(dataset.root), path, size, head)))


def read(run: Path | None) -> Places | None:
    """What :func:`record` wrote into ``run``; None for a lone checkpoint, or where it wrote nothing.

    Raises:
        FlowtrainError: the file is damaged.
    """
    if run is None or not (run / NAME).is_file():
        return None
    try:
        places = Places(**json.loads((run / NAME).read_bytes()))
        for place in (places.root, places.path):
            if place is not None and (not os.path.isabs(place) or "\0" in place or "${" in place):
                raise ValueError("it holds no absolute path")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        line = f"{run / NAME}: cannot be read ({error}); remove it, and say dataset.path=PATH or dataset.root=PATH"
        raise FlowtrainError(line) from error
    return places


def remembered(run: Path | None) -> dict[str, str]:
    """The keys of dataset that ``run`` remembers. A root that is gone is left out: the usual one may have the data."""
    places = read(run)
    if places is None:
        return {}
    root = {"root": places.root} if os.path.isdir(places.root) else {}
    return root if places.path is None else {**root, "path": places.path}


def announce(run: Path | None, dataset: Dataset) -> None:
    """Log where ``dataset`` is opened from, the command line or what ``run`` remembers, and whether the data at a
    remembered place have changed.

    Raises:
        UsageError: they are no longer there.
    """
    places = read(run)
    if places is None:
        return
    record = printable(str(run / NAME))
    if places.path is not None and os.path.abspath(dataset.path or "") == places.path:
        if not os.path.exists(places.path) and not expand_braces(Path(places.path)):
            raise UsageError(f"{places.path}, the data of this run by {record}, is gone: say dataset.path=PATH")
        path = printable(places.path)
        log.info("data: %s, as %s says", path, record)
        size, head = _fingerprint(places.path)
        if size != places.size:
            unit = "entries" if os.path.isdir(places.path) else "bytes"
            log.warning("%s has changed since training: %s %s, not %s", path, size, unit, places.size)
        elif head != places.head:
            log.warning("%s has changed since training: it begins otherwise", path)
    elif places.path is not None and dataset.path is not None:
        log.info("data: %s", printable(os.path.abspath(dataset.path)))
    elif places.path is None and dataset.path is None and dataset.uses_root:
        if os.path.abspath(dataset.root) == places.root:
            log.info("data: under %s, as %s says", places.root, record)
        elif not os.path.isdir(places.root):
            log.info("data: under %s, since %s, which %s says, is gone", dataset.root, places.root, record)


def _fingerprint(path: str) -> tuple[int | None, str | None]:
    """The size and the head of what is at ``path``, as in :class:`Places`; None of a pipe. Raises FlowtrainError."""
    try:
        if os.path.isdir(path):
            names = sorted(map(os.fsencode, os.listdir(path)))
            return len(names), hashlib.sha256(b"\0".join(names)).hexdigest()
        paths = [path] if os.path.exists(path) else [*map(str, expand_braces(Path(path)))]
        if not paths or not all(map(os.path.isfile, paths)):
            return None, None
        size, heads = 0, hashlib.sha256()
        for one in paths:
            with open(one, "rb") as file:
                size += os.fstat(file.fileno()).st_size
                heads.update(file.read(HEAD // len(paths)))
        return size, heads.hexdigest()
    except OSError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error.strerror})") from error
