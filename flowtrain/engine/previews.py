"""Images of what a flow has learned, drawn while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from flowtrain.engine.state import Stateful
from flowtrain.errors import FlowtrainError, Interrupted
from flowtrain.flow import Flow
from flowtrain.runtime import distributed
from flowtrain.runtime.interrupts import check_signals, interruptible

log = logging.getLogger("flowtrain")


class Previews(Stateful):
    """Draws images of a flow at intervals, on the first process while the others wait.

    Args:
        draw: draws one image of a flow, (3, H, W) uint8, or returns None where it cannot.

    Attributes:
        step: of the last image.
    """

    STATE = ("step",)

    def __init__(self, draw: Callable[[Flow], Tensor | None]):
        self.draw, self.step = draw, 0

    def run(self, flow: Flow, step: int) -> Tensor | None:
        """Draw an image of ``flow``; None on the other processes, and after a failure, which does not end training.

        Raises:
            Interrupted: on every process, if a signal came first.
        """
        image = None
        if distributed.is_main():
            with suppress(Interrupted):  # check_signals raises it on every process
                image = self._try_draw(flow, step)
        check_signals()
        self.step = step
        return image

    def _try_draw(self, flow: Flow, step: int) -> Tensor | None:
        try:
            with interruptible():
                return self.draw(flow)
        except Interrupted:
            raise
        except (FloatingPointError, FlowtrainError) as error:
            log.warning("step %d: no image: %s", step, error)
            return None
