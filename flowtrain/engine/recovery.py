"""Steps whose loss or gradient is not finite: they are skipped, and training recovers from many in a row, or stops."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from flowtrain.engine.state import Stateful
from flowtrain.errors import FlowtrainError

log = logging.getLogger("flowtrain")

LIMIT = 3  # rollbacks in a run


class Recovery(Stateful):
    """Counts bad steps, and after too many in a row goes back to a copy of the weights from before a good step.

    The batches that spoiled the weights may do so again: training goes on with those that follow, at a lower rate.

    Args:
        limit: number of bad steps in a row that are too many.
        factor: of the learning rate, for each rollback; None: training stops instead.
        every: steps from one copy to the next.

    Attributes:
        skipped: number of bad steps so far.
        in_a_row: number of bad steps since the last good one.
        rollbacks: number of rollbacks so far.
        copy: of the weights' state, with its ``step``, in the host's memory.
    """

    STATE = ("skipped", "in_a_row", "rollbacks", "copy")

    def __init__(self, limit: int, factor: float | None, every: int):
        self.limit, self.factor, self.every = limit, factor, every
        self.skipped = self.in_a_row = self.rollbacks = 0
        self.copy: dict | None = None

    def is_copy_due(self, step: int) -> bool:
        """Whether there is to be a new copy at ``step``, if that is a good one: before its update."""
        return self.factor is not None and (self.copy is None or step >= self.copy["step"] + self.every)

    def accept(self, step: int, state: Callable[[], dict]) -> None:
        """Note a good step; copy the weights' ``state()`` where that is due."""
        self.in_a_row = 0
        if self.is_copy_due(step):
            self.copy = _copy({"step": step, **state()})

    def skip(self, step: int, loss: float, norm: float) -> bool:
        """Note a bad step; whether there are too many in a row."""
        if not self.skipped:
            log.warning("step %d: loss %g, gradient norm %g: skipped, as will be others like it", step, loss, norm)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return self.in_a_row >= self.limit

    @property
    def possible(self) -> bool:
        """Whether training can be rolled back."""
        return self.factor is not None and self.copy is not None and self.rollbacks < LIMIT

    def roll_back(self, step: int, cause: str) -> dict:
        """The weights' state to go on from."""
        problem, self.in_a_row, self.rollbacks = self._problem(), 0, self.rollbacks + 1
        log.warning(
            f"step {step}: {problem}; {cause}; on from the weights of step {self.copy['step']}, "
            f"the rate times {self.rate:g} (rollback {self.rollbacks} of at most {LIMIT})"
        )
        return _copy(self.copy)

    def error(self, step: int, cause: str, file) -> FlowtrainError:
        """What to stop with, where training cannot be rolled back; ``file``, if any, holds the last good weights."""
        kept = f"the weights before them are in {file}; " if file else ""
        return FlowtrainError(
            f"stopped at step {step}: {self._problem()}; {cause}; {kept}"
            "a lower optimizer.lr, a trainer.clip or trainer.rollback may help; trainer.layer_statistics=true shows "
            "how each layer's scale and log-determinant grow until then"
        )

    def _problem(self) -> str:
        return f"{self.in_a_row} steps in a row had a loss or gradient that is not finite"

    @property
    def rate(self) -> float:
        """The factor of the learning rate after all rollbacks."""
        return (self.factor or 1.0) ** self.rollbacks


def _copy(state):
    """Plain containers with copies of their tensors, in the host's memory."""
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state
