"""Signals that ask a run to save and leave."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from flowtrain.errors import Interrupted
from flowtrain.runtime import distributed
from flowtrain.runtime.signals import SAME, SIGNALS

PATIENCE = 1.0  # seconds that what can be left off has to end by itself


class Asked:
    """What a run has been asked by signals: ``signum``, or 0."""

    def __init__(self):
        self.signum, self.impatient, self.process = 0, False, os.getpid()

    def note(self, signum: int, _frame) -> None:
        if os.getpid() != self.process:  # forked from it, to read data: not what was asked
            return
        self.signum = self.signum or signum
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def hurry(self, _signum: int, _frame) -> None:
        if self.impatient:
            raise Interrupted(self.signum)


_asked: Asked | None = None  # of the run that this process is in, if it is in one


@contextmanager
def remembered() -> Iterator[Asked]:
    """Within it signals are only noted, for the loop to act on between two steps; one more, a second or more after
    the first, ends the process at once, whatever it waits for."""
    global _asked
    _asked = Asked()
    before = {signum: signal.signal(signum, _asked.note) for signum in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _asked.hurry)
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    waker = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_at_the_second, args=(ours,), daemon=True)
    watch.start()
    try:
        yield _asked
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(waker)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _asked = None
        theirs.shutdown(socket.SHUT_RDWR)  # forked readers of data have copies of it, which closing would not reach
        theirs.close()
        watch.join()
        ours.close()


def _end_at_the_second(numbers: socket.socket) -> None:
    """A thread, for the main one may wait in C++ for a process that no longer answers."""
    first = None
    while received := numbers.recv(1):
        if received[0] in SIGNALS:
            first = first or time.monotonic()
            if time.monotonic() - first > SAME:
                os._exit(Interrupted(received[0]).exit_code)


def _forget_the_parents() -> None:
    if _asked:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_the_parents)


@contextmanager
def impatiently() -> Iterator[None]:
    """Within it, Interrupted is raised soon after a signal: for work of one process that changes nothing."""
    asked = _asked or Asked()  # outside of training, signals have other handlers
    try:
        asked.impatient = True
        if asked.signum:
            raise Interrupted(asked.signum)
        yield
    finally:
        asked.impatient = False


def awaited(batches: Iterator, default=None):
    """The next of ``batches``, or ``default``; Interrupted soon after a signal, but for one of several processes: the
    others may have begun the step that it would leave."""
    with impatiently() if distributed.world() == 1 else nullcontext():
        return next(batches, default)


def heed() -> None:
    """Raise Interrupted on every process if one has noted a signal. To be called by all of them."""
    if _asked:
        _shared(0)


def heeded(batches: Iterable) -> Iterator:
    """This process's ``batches``; Interrupted before the next one on every process, if one has noted a signal."""
    if not _asked:
        yield from batches
        return
    batches, nothing = iter(batches), object()
    while True:
        batch = awaited(batches, nothing)
        if not _shared(batch is not nothing):
            return
        if batch is not nothing:  # another process has one more
            yield batch


def _shared(count: int) -> int:
    """``count`` summed over the processes. Raises Interrupted on all if one has noted a signal."""
    own = torch.tensor([count, *(_asked.signum == signum for signum in SIGNALS)], dtype=torch.int64)
    total, *counts = distributed.all_sum(own).tolist()
    for signum, noted in zip(SIGNALS, counts):
        if noted:
            raise Interrupted(signum)
    return total
