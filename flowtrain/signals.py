"""The signals that end a command in order: 130 for SIGINT, 143 for SIGTERM and SIGUSR1."""

import signal
import sys

from flowtrain.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def end_at_once(announce: bool) -> None:
    """Until the trainer installs handlers that save first, a signal ends the process with its code, untraced."""

    def end(signum, frame):
        interrupted = Interrupted(signum)
        if announce:
            print(f"flowtrain: {interrupted}", file=sys.stderr)
        raise SystemExit(interrupted.exit_code)  # not an Exception, which a library might catch

    for number in SIGNALS:
        signal.signal(number, end)


def end_in_kernel() -> None:
    """While a process waits for the others in C++, where Python's handlers do not run: die of the signal itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
