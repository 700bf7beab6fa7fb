"""Signals that ask a run to save and leave."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Asked:
    """The signal that came, or 0."""

    signum = 0
    at = 0.0


@contextmanager
def remembered():
    """Within it these signals are only noted, for the loop to act on between two steps; another one ends at once.

    A terminal's Ctrl-C reaches a launcher and its workers, and the launcher passes it on: what follows within two
    seconds counts as the same request.
    """
    asked = Asked()

    def note(signum, _frame):
        if asked.signum and time.monotonic() - asked.at > 2:
            os._exit(128 + signum)
        if not asked.signum:
            asked.signum, asked.at = signum, time.monotonic()

    before = {signum: signal.signal(signum, note) for signum in ASKED}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
