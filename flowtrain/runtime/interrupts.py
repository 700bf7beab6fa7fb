"""Signals that ask a training run to save and end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

from flowtrain.errors import Interrupted
from flowtrain.runtime import distributed
from flowtrain.runtime.signals import SAME, SIGNALS, end_if_signalled

PATIENCE = 1.0  # seconds in which interruptible work may still end by itself


class SignalNote:
    """The first signal that a run has received: ``signum``, or 0."""

    def __init__(self):
        self.signum, self.interruptible, self.process = 0, False, os.getpid()

    def write(self, signum: int, _frame) -> None:
        if os.getpid() != self.process:  # a fork that reads data: the signal was not for the run
            return
        self.signum = self.signum or signum
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def interrupt(self, _signum: int, _frame) -> None:
        if self.interruptible:
            raise Interrupted(self.signum)


_note: SignalNote | None = None  # of the run in this process, if there is one
_signals_are_theirs = ContextVar("flowtrain_signals_are_theirs", default=False)


@contextmanager
def leave_signals() -> Iterator[None]:
    """Within it, signals stay with the program around, whose handlers know what to end: Ctrl-C is KeyboardInterrupt."""
    token = _signals_are_theirs.set(True)
    try:
        yield
    finally:
        _signals_are_theirs.reset(token)


@contextmanager
def note_signals() -> Iterator[SignalNote]:
    """Within it signals are only noted, for the training loop to act on between two steps; within
    :func:`leave_signals` none are.

    Another signal, a second or more after the first, ends the process at once, whatever it waits for.
    """
    global _note
    if _signals_are_theirs.get():
        yield SignalNote()
        return
    end_if_signalled()
    _note = SignalNote()
    before = {signum: signal.signal(signum, _note.write) for signum in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _note.interrupt)
    theirs, ours = socket.socketpair()
    theirs.setblocking(False)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_at_the_second, args=(ours,), daemon=True)
    watch.start()
    try:
        yield _note
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _note = None
        theirs.shutdown(socket.SHUT_RDWR)  # forked data readers hold copies of it, which closing would not reach
        theirs.close()
        watch.join()
        ours.close()


def _end_at_the_second(numbers: socket.socket) -> None:
    """Runs in a thread: the main one may wait in C++ for a process that no longer answers."""
    first = None
    while received := numbers.recv(1):
        if received[0] in SIGNALS:
            first = first or time.monotonic()
            if time.monotonic() - first > SAME:
                os._exit(Interrupted(received[0]).exit_code)


def _close_wakeup_in_child() -> None:
    if _note:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_close_wakeup_in_child)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it, Interrupted is raised soon after a signal: for work of one process that changes nothing."""
    note = _note or SignalNote()  # outside of training, signals have other handlers
    try:
        note.interruptible = True
        if note.signum:
            raise Interrupted(note.signum)
        yield
    finally:
        note.interruptible = False


def next_batch(batches: Iterator, default=None):
    """The next of ``batches``, or ``default``.

    A single process raises Interrupted soon after a signal. One of several first waits for the batch: the others may
    have begun the step that it would leave.
    """
    with interruptible() if distributed.world() == 1 else nullcontext():
        return next(batches, default)


def check_signals() -> None:
    """Raise Interrupted on every process if one has noted a signal. To be called by all of them."""
    if _note:
        _sum_and_check(0)


def interruptible_batches(batches: Iterable) -> Iterator:
    """This process's ``batches``. Before each, raises Interrupted on every process if one has noted a signal."""
    if not _note:
        yield from batches
        return
    batches, nothing = iter(batches), object()
    while True:
        batch = next_batch(batches, nothing)
        if not _sum_and_check(batch is not nothing):
            return
        if batch is not nothing:  # another process has one more
            yield batch


def _sum_and_check(count: int) -> int:
    """``count`` summed over the processes. Raises Interrupted on all if one has noted a signal."""
    own = torch.tensor([count, *(_note.signum == signum for signum in SIGNALS)], dtype=torch.int64)
    total, *counts = distributed.all_sum(own).tolist()
    for signum, noted in zip(SIGNALS, counts):
        if noted:
            raise Interrupted(signum)
    return total
