"""What the processes of a run decide by."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.runtime import distributed
from flowtrain.runtime.signals import SIGNALS


class Agreed:
    """What a step decides by, the same on every process, on its way from the device.

    Args:
        figures: the mean loss and the gradient's norm; of several processes also what ``own`` is of a single one.
        own: any process's signal (or 0), and the first process's clock.
    """

    def __init__(self, figures: Tensor, own: tuple[int, float] | None = None):
        self._given, self._own = figures, own
        self._figures = figures.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.current_stream(figures.device).record_event() if figures.is_cuda else None

    @property
    def finite(self) -> Tensor:
        """Whether the loss and the gradient are, a bool on the device."""
        return self._given[:2].isfinite().all()

    def read(self) -> tuple[float, float, int, float]:
        """The mean loss, the gradient's norm, any process's signal (or 0) and the first process's clock: a step's one
        read from the device. It does not wait for what has been launched since."""
        if self._arrival:
            self._arrival.synchronize()
        loss, norm, *others = self._figures.tolist()
        if self._own:
            return loss, norm, *self._own
        clock, *counts = others
        return loss, norm, next((one for one, count in zip(SIGNALS, counts) if count), 0), clock


def agree(loss: Tensor, norm: Tensor, signum: int, seconds: float) -> Agreed:
    """Share each process's loss, norm of the global gradient, signal (or 0) and clock."""
    world, figures = distributed.world(), torch.stack([loss, norm])
    if world == 1:
        return Agreed(figures, (signum, seconds))
    clock = seconds if distributed.rank() == 0 else 0.0
    own = torch.tensor([clock, *(float(signum == one) for one in SIGNALS)], dtype=torch.float64)
    shared = figures.double() / world
    return Agreed(distributed.all_sum(torch.cat([shared, own.to(shared.device, non_blocking=True)])))
