"""How a process ends: an error as one line and an exit code."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from flowtrain.errors import FlowtrainError, cause_of

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


def leave(code: int) -> None:
    """End a process of a group at once. After an error the other ranks are the launcher's to end; after none, gloo's
    thread may still hold a tensor while the interpreter finalizes, and abort."""
    import logging

    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explain(error: BaseException, run_dir: str | None = None) -> tuple[str, int]:
    """An error as one line and an exit code. What nobody foresaw leaves its traceback in the run's log."""
    import traceback

    if FULL_ERROR and type(error).__name__ != "Failed":  # a Failed has been shown where it happened
        traceback.print_exception(error)
    if found := cause_of(error, FlowtrainError):
        return " ".join(str(found).split()), found.exit_code
    text = " ".join(f"{type(error).__name__}: {error}".split())
    log = os.path.join(run_dir or "", "train.log")
    if run_dir and os.path.isfile(log):
        with suppress(OSError):  # of a full disk
            with open(log, "a") as file:
                traceback.print_exception(error, file=file)
            return f"{text} (traceback in {log})", 1
    return f"{text} (HYDRA_FULL_ERROR=1 shows where)", 1
