"""What belongs to the program around a training in Python, and is as it was afterwards."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_lock, _users = threading.Lock(), 0
_restore: list[Callable[[], object]] = []
_is_quiet: ContextVar[bool] = ContextVar("flowtrain_is_quiet", default=False)


@contextmanager
def borrowed_torch() -> Iterator[None]:
    """Within it, numbers are float32 by default, gradients are on, and torch's generators, switches and number of
    threads may change.

    All but the number of threads belong to the process: they are restored when the last of the threads that are within
    it leaves.
    """
    global _users, _restore
    threads = torch.get_num_threads()
    with _lock:
        if not _users:
            _restore = _ways_back()
        _users += 1
        torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        with _lock:
            _users -= 1
            if not _users:
                for restore in _restore:
                    restore()


def _ways_back() -> list[Callable[[], object]]:
    """Functions that set torch's state as it is now."""
    dtype, cpu = torch.get_default_dtype(), torch.get_rng_state()
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32, conv_tf32, benchmark = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    back: list[Callable[[], object]] = [
        lambda: torch.set_default_dtype(dtype),
        lambda: torch.set_rng_state(cpu),
        lambda: torch.use_deterministic_algorithms(strict, warn_only=warns),
        lambda: setattr(matmul, "allow_tf32", tf32),
        lambda: setattr(cudnn, "allow_tf32", conv_tf32),
        lambda: setattr(cudnn, "benchmark", benchmark),
    ]
    return back if devices is None else [*back, lambda: torch.cuda.set_rng_state_all(devices)]


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, in this thread, nothing is logged."""
    for name, logger in [*logging.root.manager.loggerDict.items()]:
        if name.partition(".")[0] == "flowtrain" and isinstance(logger, logging.Logger):
            logger.addFilter(_log_unless_quiet)  # which it has once, however often it is added
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def _log_unless_quiet(record: logging.LogRecord) -> bool:
    return not _is_quiet.get()
