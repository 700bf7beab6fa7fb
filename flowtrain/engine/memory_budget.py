"""How many rows are evaluated or decoded at once: as many as a memory budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flowtrain.engine.peak import peak_bytes

MOST = 2**16  # rows; more gain nothing
FEW = 256  # rows that are measured, fewer where an event is large
NUMBERS = 2**16  # in the rows that are measured


def few_rows(dimensions: int) -> int:
    """The number of rows of D numbers to measure: some."""
    return max(1, min(FEW, NUMBERS // dimensions))


def budget(device: torch.device) -> int:
    """Bytes of tensors alive at once. On a GPU an eighth of its memory, free or not, so that batches are the same in
    every run; training leaves that much between two steps. On a CPU the caches of its threads set it: beyond them,
    larger batches are slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 8
    return 2**24 * max(2, torch.get_num_threads())


def rows_within_budget(work: Callable[[], object], rows: int, device: torch.device) -> int:
    """The number of rows that ``work``, which is measured on ``rows`` of them, can take at once: at least 1."""
    return max(1, min(MOST, budget(device) * rows // max(peak_bytes(work), 1)))


def even_batches(total: int, most: int, processes: int = 1) -> int:
    """The size of at most ``most`` of batches that share out ``total`` rows evenly.

    >>> even_batches(1000, 400), even_batches(1000, 400, processes=2), even_batches(10, 400, processes=2)
    (334, 250, 5)
    """
    rounds = math.ceil(total / (most * processes))
    return max(1, math.ceil(total / max(1, rounds * processes)))
