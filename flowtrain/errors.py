"""The errors that a user meets: each is one clear line and an exit code."""

import signal


class FlowtrainError(Exception):
    """Something failed. Its text says in one line what, and what would be right."""

    exit_code = 1


class UsageError(FlowtrainError):
    """A mistake found before any data are touched: a bad key or value, a missing file, no such checkpoint."""

    exit_code = 2


class OutOfMemory(FlowtrainError):
    """A device has too little memory for what was asked for."""


class Interrupted(FlowtrainError):
    """Ended by a signal: the exit code is 128 + `signum` (130 for SIGINT), but 143 for SIGTERM and SIGUSR1 alike."""

    def __init__(self, signum: int):
        signum = int(signum)
        self.signum, self.name = signum, signal.Signals(signum).name
        super().__init__(f"interrupted by {self.name}")
        graceful = (signal.SIGTERM, signal.SIGUSR1)  # a scheduler's two ways to say "save and leave"
        self.exit_code = 143 if signum in graceful else 128 + signum


def cause_of(error: BaseException | None, kind: type):
    """The first error of a ``kind`` among ``error`` and what it was raised from; None where there is none."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error
