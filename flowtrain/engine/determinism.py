"""The same bits in every run, on a GPU too, and what that costs."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median

import torch

from flowtrain.errors import UsageError
from flowtrain.flow import Flow

ROUNDS = 5


def insist() -> None:
    """From here on only deterministic operations run; see :func:`explained` for those that have no such form."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU's first product is taken
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def explained():
    """Within it, what torch cannot do deterministically is UsageError."""
    try:
        yield
    except RuntimeError as error:
        operation, said, _ = str(error).partition(" does not have a deterministic implementation")
        if not said:
            raise
        raise UsageError(f"deterministic=true: {operation} has no deterministic form here; use false") from error


def cost(flow: Flow, step: Callable[[Flow], object]) -> float:
    """How many times as long ``step`` takes of a copy of ``flow`` with :func:`insist` as without: a median."""
    flow, ratios = copy.deepcopy(flow).train(), []  # its counters and moments are not the run's
    torch.use_deterministic_algorithms(False)
    _seconds(flow, step)  # the first is slower
    for _ in range(ROUNDS):
        torch.use_deterministic_algorithms(False)
        free = _seconds(flow, step)
        torch.use_deterministic_algorithms(True)
        ratios.append(_seconds(flow, step) / free)
    return median(ratios)


def _seconds(flow: Flow, step: Callable[[Flow], object]) -> float:
    wait = torch.cuda.synchronize if next(flow.parameters()).is_cuda else lambda: None
    wait()
    began = time.monotonic()
    step(flow)
    wait()
    return time.monotonic() - began
