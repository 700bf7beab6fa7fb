"""The signals that end a command in order: 130 for SIGINT, 143 for SIGTERM and SIGUSR1."""

import os
import signal
import sys

from flowtrain.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME = 1.0  # seconds: a terminal's Ctrl-C reaches a launcher and its workers, and the launcher passes it on


def end_at_once() -> None:
    """Until the trainer installs handlers that save first, a signal ends the process with its code, untraced."""

    def end(signum, frame):
        interrupted = Interrupted(signum)
        print(f"flowtrain: {interrupted}", file=sys.stderr)
        raise SystemExit(interrupted.exit_code) from interrupted  # not an Exception, which a library might catch

    for number in SIGNALS:
        signal.signal(number, end)


def end_with_torchrun() -> None:
    """Get SIGTERM when the parent ends, as torchrun does by a signal that it does not pass on, such as SIGUSR1."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_in_kernel() -> None:
    """In a process that waits for others in C++, where Python's handlers do not run, and has nothing to put in order:
    until the trainer installs its own, die of the signal itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
