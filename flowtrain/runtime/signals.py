"""The signals that ask a command to end: exit code 130 for SIGINT, 143 for SIGTERM and SIGUSR1."""

import os
import signal
import sys

from flowtrain.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_received: list[int] = []  # what :func:`end_at_once` has answered
SAME = 1.0  # seconds in which two signals count as one: the launcher passes on a Ctrl-C that workers also get


def end_at_once() -> None:
    """Let a signal end the process with its exit code and no traceback, until the trainer installs its handlers."""

    def end(signum, frame):
        print(f"flowtrain: {Interrupted(signum)}", file=sys.stderr)
        _received.append(signum)
        end_if_signalled()

    for number in SIGNALS:
        signal.signal(number, end)


def end_if_signalled() -> None:
    """Raise SystemExit if :func:`end_at_once` has answered a signal. For the places where long work begins: a library
    that was being imported, or a callback, may have swallowed the first SystemExit."""
    if _received:
        interrupted = Interrupted(_received[0])
        raise SystemExit(interrupted.exit_code) from interrupted  # not an Exception, which libraries catch more often


def end_with_torchrun() -> None:
    """Get SIGTERM when the parent ends: torchrun ends by signals that it does not pass on, such as SIGUSR1."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_in_kernel() -> None:
    """Let the signal itself kill the process, until the trainer installs its handlers: for a process that waits in C++,
    where Python's handlers do not run, and has nothing to save."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
