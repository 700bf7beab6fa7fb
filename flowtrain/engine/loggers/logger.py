"""What every logger offers to a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowtrain.engine.budget import Budget


@dataclass(frozen=True)
class RunRecord:
    """The run that a logger is to record.

    Attributes:
        directory: the run directory.
        step: where training starts; not 0 where it resumes. What was recorded of later steps is void.
        records: the number of calls of :meth:`Logger.scalars` up to there; what later calls recorded is void.
        budget: how long it trains.
        key, unit: of the objective's figure.
        train_key, train_unit: of that figure in training, where it is another one; None: it is not.
        settings: the configuration by dotted names.
        examples: what the data consist of, "images" or "rows".
    """

    directory: Path
    step: int
    records: int
    budget: Budget
    key: str
    unit: str
    settings: dict = field(default_factory=dict)
    examples: str = "rows"
    train_key: str | None = None
    train_unit: str | None = None


@runtime_checkable
class Logger(Protocol):
    """Records a run. Only the first process has loggers.

    The methods raise WriteError where a disk or a server does not take what they write.
    """

    def open(self, run: RunRecord) -> None:
        """Begin to record; called once, before everything else."""
        ...

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record named numbers. The names of clocks and rates, which no two runs share, start with ``system/``."""
        ...

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Record an image, (3, H, W) uint8."""
        ...

    def hyperparameters(self, values: dict, metrics: dict[str, float]) -> None:
        """Record the run's settings and final figures; called once, when it has finished."""
        ...

    def close(self) -> None:
        """End recording, also after an error."""
        ...


class NullLogger:
    """Records nothing: the base class of loggers that record only some things.

    Attributes:
        writes_elsewhere: whether records leave the run directory; a dry run does not open such a logger.
    """

    writes_elsewhere = False

    def open(self, run):
        pass

    def scalars(self, step, values):
        pass

    def image(self, step, name, image):
        pass

    def hyperparameters(self, values, metrics):
        pass

    def close(self):
        pass
