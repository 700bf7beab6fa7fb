"""``status.json`` in a run directory: the last step saved, the process that runs it, how it ended.

    {"state": "interrupted", "resumable": true, "step": 1200, "signal": "SIGTERM", "error": null, "pid": 7, "host": "a"}

``state`` is running, interrupted (by ``signal``), failed (by ``error``) or finished; ``resumable`` says whether the
same command with ``resume=true`` continues: from ``step``, the last that is saved, or from the start where that is 0.
After a kill, ``state`` is still running, but there is no process ``pid`` on ``host``.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from flowtrain.errors import Interrupted, UsageError, cause_of
from flowtrain.runtime import files

NAME, LOCK = "status.json", ".lock"


def record_start(run_dir) -> None:
    """Record that this process trains in ``run_dir`` from now on."""
    here = {"pid": os.getpid(), "host": platform.node()}
    _write(run_dir, state="running", resumable=True, signal=None, error=None, **here)


def record_checkpoint(run_dir, step: int) -> None:
    """Record that there is a checkpoint of ``step``."""
    _write(run_dir, step=step)


def record_end(run_dir, error: BaseException | None = None, text: str | None = None) -> None:
    """Record that the run has finished, or has ended by ``error``, described in ``text``; unless another process has
    the run by now."""
    interrupted = cause_of(error, Interrupted)
    if error is None:
        how = {"state": "finished", "resumable": False}
    elif interrupted:
        how = {"state": "interrupted", "resumable": True, "signal": interrupted.name}
    else:
        how = {"state": "failed", "resumable": any(Path(run_dir).glob("checkpoints/*.pt")), "error": text}
    try:
        with lock_file(run_dir):
            _write(run_dir, **how)
    except RunLocked:
        pass
    except (OSError, files.WriteError):  # a disk that is full or read-only
        if error is None:  # else the run's own error matters more
            raise


@contextmanager
def lock(run_dir):
    """Lock the run directory: two writers would spoil each other's records. Raises UsageError if another has it."""
    try:
        with lock_file(run_dir):
            record_start(run_dir)
            yield
    except RunLocked as holder:
        raise UsageError(f"{run_dir}: is being trained by {holder}") from None


class RunLocked(Exception):
    """Another process has the directory: its text says which."""


@contextmanager
def lock_file(run_dir):
    """Lock a directory. Raises RunLocked, with the holder's process and machine."""
    with open(Path(run_dir) / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.2)  # the holder may just be writing its name
            lock.seek(0)
            raise RunLocked(lock.read().strip() or "another process") from None
        os.register_at_fork(after_in_child=lock.close)  # data workers may outlive this process by seconds
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def _write(run_dir, **changes) -> None:
    path = Path(run_dir) / NAME
    known = dict.fromkeys(("state", "resumable", "step", "signal", "error", "pid", "host")) | {"step": 0}
    if path.is_file():
        with suppress(ValueError):  # empty after a power failure
            known |= json.loads(path.read_text())
    files.write_json(path, known | changes)
