"""How good a flow is while it trains, and whether it still improves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from flowtrain.engine.evaluate import Evaluation
from flowtrain.engine.objectives import Objective, Score
from flowtrain.engine.state import Stateful
from flowtrain.errors import FlowtrainError, Interrupted, OutOfMemory
from flowtrain.flow import Flow

log = logging.getLogger("flowtrain")


class Validation(Stateful):
    """Evaluates a flow at intervals and remembers the best result.

    Args:
        evaluate: evaluates a flow on the validation split, with the same result on every process.
        objective: scores the evaluation.
        patience: number of validations without improvement after which training has stalled; None: never.

    Attributes:
        step: of the last validation.
        best: the least loss so far.
        stale: number of validations since.
    """

    STATE = ("step", "best", "stale")

    def __init__(self, evaluate: Callable[[Flow], Evaluation], objective: Objective, patience: int | None = None):
        self.evaluate, self.objective, self.patience = evaluate, objective, patience
        self.step, self.best, self.stale = 0, math.inf, 0

    def run(self, flow: Flow, step: int) -> Score | None:
        """Evaluate ``flow``; a failure (None) does not end training, whose weights would be lost.

        Raises:
            Interrupted: a signal came first.
            OutOfMemory: the device has too little for it.
        """
        try:
            evaluation = self.evaluate(flow)
        except (Interrupted, OutOfMemory):  # of one process perhaps, while the others wait
            raise
        except FlowtrainError as error:
            log.warning("step %d: no validation: %s", step, error)
            self.step, self.stale = step, self.stale + 1
            return None
        score = self.objective.score(evaluation)
        self.step, self.stale = step, 0 if score.loss < self.best else self.stale + 1
        self.best = min(self.best, score.loss)
        log.info("step %d: validation %s%s", step, score.text, ", the best so far" if self.improved else "")
        return score

    @property
    def improved(self) -> bool:
        """Whether the last validation is the best."""
        return self.stale == 0

    @property
    def stalled(self) -> bool:
        return self.patience is not None and self.stale >= self.patience
