"""The end of a process: its error as one line, and its exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress

from flowtrain.errors import FlowtrainError, cause_of

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


class WorkerError(FlowtrainError):
    """The error of a worker process, with its exit code."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def leave(code: int) -> None:
    """End a process of a group at once, without finalizing the interpreter: a thread of gloo that still holds a tensor
    would then abort. After an error, the launcher ends the other ranks."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def describe_error(error: BaseException, run_dir: str | None = None) -> tuple[str, int]:
    """An error as one line, and its exit code. An unexpected error leaves its traceback in the run's log."""
    if FULL_ERROR and not isinstance(error, WorkerError):  # the worker has printed its own
        traceback.print_exception(error)
    if found := cause_of(error, FlowtrainError):
        return " ".join(str(found).split()), found.exit_code
    text = " ".join(f"{type(error).__name__}: {error}".split())
    log = os.path.join(run_dir or "", "train.log")
    if run_dir and os.path.isfile(log):
        with suppress(OSError):  # a full disk
            with open(log, "a") as file:
                traceback.print_exception(error, file=file)
            return f"{text} (traceback in {log})", 1
    return f"{text} (HYDRA_FULL_ERROR=1 shows where)", 1
