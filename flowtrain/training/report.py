"""The report of a run that has just ended."""

from __future__ import annotations

import logging

from flowtrain.commands import report
from flowtrain.data import Split
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import distributed
from flowtrain.training.setup import SetUp

log = logging.getLogger("flowtrain")


def write_report(run: SetUp, trainer: Trainer) -> None:
    """Write report.html on the first process, while the others wait; the flow holds the best weights. Only now is the
    test split opened, on every process, since the first one downloads for all."""
    splits, failed = {"train": run.train, "val": run.val}, None
    try:
        splits["test"] = run.data.split("test")
    except FlowtrainError as error:
        failed = error

    def split(name: str) -> Split:
        if name not in splits:
            raise FlowtrainError(f"the test split cannot be opened: {failed}")
        return splits[name]

    flow = trainer.weights.whole(trainer.flow)
    if distributed.is_main():
        path = report.of_training(
            run.config, run.stored, run.run_dir, trainer.seconds, flow, run.spec, run.train.columns, split
        )
        if path:
            log.info("report: %s", path)
    distributed.barrier()
