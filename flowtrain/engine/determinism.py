"""The same bits in every run, on a GPU too, and what that costs."""

from __future__ import annotations

import copy
import os
import time
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from flowtrain.errors import Refused
from flowtrain.flow import Flow

ROUNDS = 5


def insist() -> None:
    """From here on only deterministic operations run; see :func:`explained` for those that have no such form."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU's first product is taken
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def explained():
    """Within it, what torch cannot do deterministically is Refused."""
    try:
        yield
    except RuntimeError as error:
        operation, said, _ = str(error).partition(" does not have a deterministic implementation")
        if not said:
            raise
        raise Refused(f"deterministic=true: {operation} has no deterministic form here; use false") from error


def cost(flow: Flow, x: Tensor, context: Tensor | None) -> float:
    """How many times as long the gradient of a batch takes with :func:`insist` as without: the median of a few."""
    flow, ratios = copy.deepcopy(flow).train(), []  # its counters and moments are not the run's
    torch.use_deterministic_algorithms(False)
    _seconds(flow, x, context)  # the first is slower
    for _ in range(ROUNDS):
        torch.use_deterministic_algorithms(False)
        free = _seconds(flow, x, context)
        torch.use_deterministic_algorithms(True)
        ratios.append(_seconds(flow, x, context) / free)
    return median(ratios)


def _seconds(flow: Flow, x: Tensor, context: Tensor | None) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    began = time.monotonic()
    flow(x, context).mean().backward()
    wait()
    return time.monotonic() - began
