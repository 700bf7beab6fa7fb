"""``status.json`` in a run directory: how far a run is saved, who runs it or how it ended, whether it can go on.

    {"state": "interrupted", "resumable": true, "step": 1200, "signal": "SIGTERM", "error": null, "pid": 7, "host": "a"}

``state`` is running, interrupted (by ``signal``), failed (by ``error``) or finished; ``resumable`` says whether the
same command with ``resume=true`` goes on: from ``step``, the last that is saved, or anew where that is 0. A process
that was killed says nothing any more: then ``state`` is still running, but no process ``pid`` is left on ``host``.
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


def begun(run_dir) -> None:
    """This process trains in ``run_dir`` from now on."""
    here = {"pid": os.getpid(), "host": platform.node()}
    _write(run_dir, state="running", resumable=True, signal=None, error=None, **here)


def saved(run_dir, step: int) -> None:
    """There is a checkpoint of ``step``."""
    _write(run_dir, step=step)


def ended(run_dir, error: BaseException | None = None, text: str | None = None) -> None:
    """The run has ended, by ``error``, told in ``text``; or it has finished. Another process that has the run by now
    has the word."""
    interrupted = cause_of(error, Interrupted)
    if error is None:
        how = {"state": "finished", "resumable": False}
    elif interrupted:
        how = {"state": "interrupted", "resumable": True, "signal": interrupted.name}
    else:
        how = {"state": "failed", "resumable": any(Path(run_dir).glob("checkpoints/*.pt")), "error": text}
    try:
        with _locked(run_dir):
            _write(run_dir, **how)
    except _Taken:
        pass
    except (OSError, files.Unwritable):  # a disk that is full, or may only be read
        if error is None:  # else that is the one to tell
            raise


@contextmanager
def held(run_dir):
    """Have the run directory to oneself: two writers would spoil each other's records. UsageError if another has it."""
    try:
        with _locked(run_dir):
            begun(run_dir)
            yield
    except _Taken as taken:
        raise UsageError(f"{run_dir}: is being trained by {taken}") from None


class _Taken(Exception):
    pass


@contextmanager
def _locked(run_dir):
    """Raises _Taken, with the holder's process and machine."""
    with open(Path(run_dir) / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.2)  # the holder may just be writing its name
            lock.seek(0)
            raise _Taken(lock.read().strip() or "another process") from None
        os.register_at_fork(after_in_child=lock.close)  # those who read data may outlive this process by seconds
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def _write(run_dir, **changes) -> None:
    path = Path(run_dir) / NAME
    known = dict.fromkeys(("state", "resumable", "step", "signal", "error", "pid", "host")) | {"step": 0}
    if path.is_file():
        with suppress(ValueError):  # a machine that lost its power may have left it empty
            known |= json.loads(path.read_text())
    files.write_json(path, known | changes)
