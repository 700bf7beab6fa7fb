"""Training steps as the command takes them, from a Trainer that does nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from flowtrain.config.compose import conf_dir, train_config
from flowtrain.engine.budget import Budget
from flowtrain.engine.loggers import Loggers, NullLogger
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import UsageError
from flowtrain.training.setup import set_up
from on_gpu.part import NotHere, Place

WARM = 2  # reports
HAS_GRAPH = "cuda_graph:" in (conf_dir() / "trainer" / "default.yaml").read_text()


def trainer_of(place: Place, *words: str, log_every: int = 5) -> Trainer:
    """The Trainer of ``flowtrain train WORDS``, at its first step, which neither validates, draws nor saves.

    Raises:
        NotHere: flowtrain refuses the words, such as a precision that the hardware does not have.
    """
    try:
        config = train_config(*words, f"trainer.log_every={log_every}", "scheduler=constant")
        trainer = set_up(config, str(place.folder)).ready_trainer()
    except UsageError as error:
        raise NotHere(str(error)) from error
    for name in ("validate", "preview", "save"):
        assert callable(getattr(trainer, name))
        setattr(trainer, name, lambda: None)
    return trainer


def launches(graph: bool) -> list[str]:
    """The word that has a training step launched as one CUDA graph, or not."""
    if HAS_GRAPH:
        return [f"trainer.cuda_graph={str(graph).lower()}"]
    if graph:
        raise NotHere("flowtrain has no trainer.cuda_graph yet")
    return []


def around_steps(trainer: Trainer, wrap: Callable[[Callable], object]) -> None:
    """Call ``wrap(step)`` in place of each training step, a function without arguments."""
    take = trainer.take_step
    trainer.take_step = lambda *args: wrap(lambda: take(*args))


def take_steps(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """Train for so many steps; returns what was reported."""
    reports: list[dict[str, float]] = []
    trainer.loggers, trainer.budget = Loggers([_Keep(reports)]), Budget(steps, None)
    trainer.fit()
    return reports


class _Keep(NullLogger):
    def __init__(self, reports: list):
        self.reports = reports

    def scalars(self, step, values):
        self.reports.append(values)


@dataclass
class Watch(NullLogger):
    """A logger and a budget: training ends ``seconds`` after the second report, what came before warms up.

    Attributes:
        reports: (time, step, what was reported).
    """

    seconds: float
    begun: float = field(default_factory=time.perf_counter)
    reports: list = field(default_factory=list)

    def scalars(self, step, values):
        self.reports.append((time.perf_counter(), step, values))
        if len(self.reports) == WARM and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def spent(self, step, seconds) -> float:
        if len(self.reports) <= WARM:
            return 0.0
        return float(self.reports[-1][0] - self.reports[WARM - 1][0] >= self.seconds)

    def left(self, step, seconds, each) -> float:
        """Steps that are left: too few for a process beside the run that compiles for later ones."""
        return 0.0

    @property
    def warm_up(self) -> float:
        """Seconds until the first report: compilation and the choice of algorithms."""
        return self.reports[0][0] - self.begun

    @property
    def rate(self) -> float:
        """Steps a second."""
        (first, start, _), (last, stop, _) = self.reports[WARM - 1], self.reports[-1]
        return (stop - start) / (last - first)


def watch(trainer: Trainer, seconds: float) -> Watch:
    """Train for ``seconds`` after a warm-up."""
    found = Watch(seconds)
    trainer.loggers, trainer.budget = Loggers([found]), found
    trainer.fit()
    return found
