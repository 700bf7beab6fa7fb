"""``flowtrain report``: one page that shows what a run gave. Every run ends with it."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from flowtrain.commands import ReportConfig
from flowtrain.commands.collecting.collect import collect
from flowtrain.commands.collecting.source import Amounts, Source
from flowtrain.commands.restored import Restored, restore
from flowtrain.config import places
from flowtrain.config.preset import preset_of
from flowtrain.config.schema import TrainConfig
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.report.render import render
from flowtrain.report.run import Configuration, RunRecord, read_run
from flowtrain.runtime import checkpoint, distributed, files

log = logging.getLogger("flowtrain")

NAME = "report.html"
SHARE, LEAST, MOST = 0.15, 3.0, 60.0  # of the seconds of training, that its report may take; at least, at most
SMOKE = Amounts(examples=64, n=8, temperatures=(0.7, 1.0), seconds=1.0)


def main(config: ReportConfig, run_dir: str) -> dict:
    """Write report.html into the run of ``config.ckpt``, or of a lone checkpoint into ``run_dir``; print and return its
    path."""
    restored = restore(config, config.ckpt, config.weights)
    if not config.temperatures:
        raise UsageError("temperatures=[]: give at least one, such as [0.7,1.0]")
    for name in ("train", "val", "test"):  # on every process: the first one downloads for all
        with suppress(FlowtrainError):
            restored.split(name)
    folder = restored.run or Path(run_dir)
    if distributed.is_main():
        amounts = Amounts(config.examples, config.n, tuple(config.temperatures), config.seconds)
        spec, columns = restored.dataset.spec, restored.columns
        choices = restored.weights, _is_of_training(config, restored)
        source = Source(restored.flow, config, spec, columns, amounts, restored.dataset.split, *choices)
        record = read_run(restored.run, Path(config.ckpt))
        write(source, record, checkpoint.read_config(Path(config.ckpt)), folder / NAME)
        print(folder / NAME)
        if restored.run:
            for empty in (Path(run_dir), Path(run_dir).parent):
                with suppress(OSError):
                    empty.rmdir()
    distributed.barrier()
    return {"report": str(folder / NAME)}


def _is_of_training(config: ReportConfig, restored: Restored) -> bool:
    """Whether the weights and the data are those that training ended with."""
    remembered, path = places.read(restored.run), config.dataset.get("path")
    same = remembered is None or remembered.path is None or os.path.abspath(path or "") == remembered.path
    return same and config.weights != "raw"


def of_training(
    config: TrainConfig, stored: dict, run_dir: str, seconds: float, flow, spec, columns, split
) -> Path | None:
    """Write the report of the run that has just ended, on the first process, within a share of its ``seconds``.

    Nothing that goes wrong here may spoil the run: it becomes a warning, and None is returned.

    Args:
        stored: the configuration as checkpoints keep it.
        split: returns "train", "val" or "test".
    """
    limit = min(max(SHARE * seconds, LEAST), MOST, config.dist.timeout_s / 4)
    amounts = SMOKE if config.smoke else Amounts(seconds=limit)
    path = Path(run_dir) / NAME
    try:
        source = Source(flow, config, spec, columns, amounts, split)
        run = Path(run_dir).absolute()
        record = read_run(run, run / "checkpoints" / "best.pt")
        write(source, record, stored, path)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("no report: %s; the run itself is complete, and flowtrain report tries again", reason[:300])
        return None
    return path


def write(source: Source, record: RunRecord, config: dict, path: Path) -> None:
    """Gather what a report shows, and write the page. Raises FlowtrainError, WriteError."""
    material = collect(source, record)
    preset = preset_of(source.config, record.overrides, record.directory)
    page = render(record, material, Configuration(config, preset.config, preset.command, preset.note))
    files.write(path, page.html().encode())
