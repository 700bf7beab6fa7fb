"""The checkpoints of a run."""

from __future__ import annotations

import copy
from pathlib import Path

from flowtrain.engine.replay import Record
from flowtrain.runtime import checkpoint, distributed, status


class Checkpoints:
    """Writes checkpoints into a run directory, from the first process.

    Args:
        config: the run's configuration as plain data, from which the flow can be built again.
        columns: what is known of a table's columns, as plain data, or None.
    """

    def __init__(self, run_dir: Path, config: dict, columns: dict | None = None):
        self.run_dir = Path(run_dir)
        self.directory = self.run_dir / "checkpoints"
        self.last, self.best = self.directory / "last.pt", self.directory / "best.pt"
        self.description = {"config": config, "columns": columns}

    def save_last(self, state: dict) -> None:
        """Write last.pt, and keep the one before as previous.pt."""
        if distributed.is_main():
            checkpoint.save_last({**self.description, **state}, self.directory)
            status.record_checkpoint(self.run_dir, state["step"])

    def save_best(self, state: dict) -> None:
        if distributed.is_main():
            checkpoint.save({**self.description, **state}, self.best)

    def save_divergence(self, model: dict, record: Record, rank: int) -> Path:
        """Write the record of a step that diverged, and the flow's state, from process ``rank``; returns its path on
        every process."""
        path = self.run_dir / "divergence" / f"step_{record.step}.pt"
        if distributed.rank() == rank:
            state = {"model": model, "ema": None, "divergence": record.state_dict()}
            checkpoint.save({**self.description, **state}, path)
        distributed.barrier()  # an error in one process ends the others
        return path


class InMemory:
    """In place of :class:`Checkpoints`: keeps the best weights, and writes no file.

    Attributes:
        best: the weights that were validated, of the best validation; None before the first.
    """

    last = None

    def __init__(self):
        self.best: dict | None = None

    def save_last(self, state: dict) -> None:
        pass

    def save_best(self, state: dict) -> None:
        self.best = copy.deepcopy(state["ema"] or state["model"])

    def save_divergence(self, model: dict, record: Record, rank: int) -> None:
        """Keeps none."""
