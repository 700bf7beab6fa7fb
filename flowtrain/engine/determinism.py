"""The same bits in every run, on a GPU too, and the cost of that; or the fastest algorithms, whose roundings differ."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median

import torch

from flowtrain.engine.timing import seconds_of
from flowtrain.errors import UsageError
from flowtrain.flow import Flow

ROUNDS = 5


def choose(deterministic: bool) -> None:
    """Run only deterministic operations from now on; or let cuDNN time its algorithms for every new shape of a
    convolution and keep the fastest, which need not be the same one in every run."""
    if deterministic:
        enable()
    else:
        torch.backends.cudnn.benchmark = True


def enable() -> None:
    """Run only deterministic operations from now on; see :func:`determinism_errors` for those without such a form."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at a GPU's first matrix product
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def determinism_errors():
    """Raise UsageError within it for an operation that torch has no deterministic form of."""
    try:
        yield
    except RuntimeError as error:
        operation, said, _ = str(error).partition(" does not have a deterministic implementation")
        if not said:
            raise
        raise UsageError(f"deterministic=true: {operation} has no deterministic form here; use false") from error


def cost(flow: Flow, step: Callable[[Flow], object]) -> float:
    """How many times as long ``step`` takes for a copy of ``flow`` with :func:`enable` as without: a median."""
    flow, ratios = copy.deepcopy(flow).train(), []  # whose counters and moments may change
    torch.use_deterministic_algorithms(False)
    device = next(flow.parameters()).device
    seconds_of(lambda: step(flow), device)  # the first is slower
    for _ in range(ROUNDS):
        torch.use_deterministic_algorithms(False)
        free = seconds_of(lambda: step(flow), device)
        torch.use_deterministic_algorithms(True)
        ratios.append(seconds_of(lambda: step(flow), device) / free)
    return median(ratios)
