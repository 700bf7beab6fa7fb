"""What the processes of a run decide by."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.runtime import distributed
from flowtrain.runtime.signals import SIGNALS


def agree(loss: Tensor, norm: Tensor, signum: int, seconds: float) -> tuple[float, float, int, float]:
    """The mean loss, the gradient's norm, any process's signal (or 0) and the first process's clock, the same on every
    process: all that a step decides by, in its one read from the device."""
    world = distributed.world()
    clock = seconds if distributed.rank() == 0 else 0.0
    own = torch.tensor([clock, *(float(signum == one) for one in SIGNALS)], dtype=torch.float64)
    shared = torch.stack([loss, norm]).double() / world
    figures = distributed.all_sum(torch.cat([shared, own.to(shared.device, non_blocking=True)]))
    loss, norm, clock, *counts = figures.tolist()
    return loss, norm, next((one for one, count in zip(SIGNALS, counts) if count), 0), clock
