"""All loggers of a run as one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from torch import Tensor

from flowtrain.engine.loggers.logger import Logger, RunRecord
from flowtrain.engine.state import Stateful


class Loggers(Stateful):
    """Passes everything on to each of some loggers, of which there may be none.

    Attributes:
        records: number of calls of :meth:`scalars` since the run's first step.
    """

    STATE = ("records",)

    def __init__(self, loggers: Iterable[Logger] = ()):
        self.loggers, self.records, self._opened = list(loggers), 0, ExitStack()

    def open(self, run: RunRecord) -> None:
        for logger in self.loggers:
            logger.open(run)
            self._opened.callback(logger.close)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.scalars(step, values)
        self.records += 1

    def image(self, step: int, name: str, image: Tensor) -> None:
        for logger in self.loggers:
            logger.image(step, name, image)

    def hyperparameters(self, values: dict, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.hyperparameters(values, metrics)

    def close(self) -> None:
        """Close those that are open, all of them, whatever one raises."""
        self._opened.close()
