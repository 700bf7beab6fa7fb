"""How long work takes, on a GPU too."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that ``work()`` takes on ``device``, kernels included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.monotonic()
    work()
    wait()
    return time.monotonic() - began


def own_seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that ``work()`` takes on ``device``; on a CPU those in which this thread runs, so that whatever else
    the machine does counts little."""
    if device.type != "cpu":
        return seconds_of(work, device)
    began = time.thread_time()
    work()
    return time.thread_time() - began
