"""``flowtrain train``: from a configuration to a trained flow, its checkpoints and its records."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from flowtrain.config import places
from flowtrain.config.schema import TrainConfig
from flowtrain.engine.trainer import Trainer
from flowtrain.runtime import distributed, environment, files, status
from flowtrain.training import dry_run
from flowtrain.training.conclusion import conclude
from flowtrain.training.errors import one_line_errors
from flowtrain.training.introduction import log_introduction
from flowtrain.training.recorded import Recorded
from flowtrain.training.report import write_report
from flowtrain.training.setup import SetUp, record_of, set_up


def main(
    config: TrainConfig,
    run_dir: str,
    look: Callable[[SetUp], None] = lambda run: None,
    before: Recorded = Recorded(),
) -> dict:
    """Train what ``config`` says into ``run_dir``; returns the summary, on every process.

    Args:
        look: called on every process with the run once its data are open.
        before: what the run that this one repeats has chosen.
    """
    with status.lock(run_dir) if distributed.is_main() else nullcontext():
        if distributed.is_main():
            for folder in ("", "checkpoints", "samples"):
                files.remove_temporary(Path(run_dir) / folder)
        run = set_up(config, run_dir, before)
        look(run)
        return dry_run.main(run) if config.dry_run else _train(run)


def _train(run: SetUp) -> dict:
    config, loggers, trainer = run.config, run.loggers, run.ready_trainer()
    if distributed.is_main():
        log_introduction(run, trainer)
        _record(run, trainer)
    record = record_of(run, trainer)
    try:
        with one_line_errors(config, trainer, run.device):
            loggers.open(record)
            trainer.fit()
            with trainer.pause_compilation():
                summary, score = conclude(run, trainer)
            if distributed.is_main():
                _record(run, trainer)  # once more: threads are chosen by now
            loggers.hyperparameters(record.settings, {run.objective.key: score.figure})
    finally:
        loggers.close()
    if config.report:
        with trainer.pause_compilation():
            write_report(run, trainer)
    return summary


def _record(run: SetUp, trainer: Trainer) -> None:
    """Write what the run computes with and where its data lie."""
    config = run.config
    chosen = {
        "precision": config.precision,
        "batch_size": config.batch_size,
        "compiled": trainer.compilation is not None,
        "cuda_graph": trainer.training_pass.is_graph,
    }
    environment.record(run.run_dir, run.device, **chosen)
    places.record(run.run_dir, run.data)
