"""One job: what Hydra calls with a composed configuration, and how it runs in one process or in many."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import flowtrain.cli.hydra_internals  # noqa: F401  quoted keys, in the processes of other launchers too
from flowtrain.cli import continuation, directories, exit_codes, launcher, sweep, worker
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.commands import COMMANDS
from flowtrain.config import compose, runs
from flowtrain.config.conversion import to_dict
from flowtrain.config.schema import TrainConfig
from flowtrain.errors import Interrupted, UsageError
from flowtrain.runtime import distributed, status
from flowtrain.runtime.signals import end_in_kernel

log = logging.getLogger("flowtrain")
logging.raiseExceptions = False  # a reader of stdout that has gone (| head) is no reason to stop
failures: list[WorkerError | BrokenPipeError] = []  # of this process's job, for the command line to report


def job(cfg: DictConfig):
    """Hydra's task function, picklable by name for launchers that run elsewhere."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    is_sweep = hydra.mode == RunMode.MULTIRUN
    command, run_dir = hydra.job.name, hydra.runtime.output_dir
    row = {"job": continuation.number_of(hydra), "overrides": " ".join(hydra.overrides.task), "run_dir": run_dir}
    start, is_dry = time.monotonic(), COMMANDS[command].trains and cfg.dry_run
    taken = COMMANDS[command].trains and directories.is_taken(run_dir, cfg.resume)
    record_end = status.record_end if COMMANDS[command].trains and not taken else lambda *_: None
    try:
        if taken:
            raise directories.taken_error(run_dir)
        summary = _run(command, cfg, run_dir, hydra, is_sweep)
        record_end(run_dir)
        if is_dry and summary:
            directories.check_room(summary.get("disk_bytes", 0))
        row = {
            "status": "dry run" if is_dry else "finished",
            "seconds": round(time.monotonic() - start, 3),
            **(summary or {}),
            **row,
        }
        return sweep.figure(summary or {})  # what a sweeper that searches minimizes
    except SystemExit as error:  # a signal before the training loop
        record_end(run_dir, error)
        raise
    except Exception as error:
        interrupted = isinstance(error, Interrupted)
        text, code = exit_codes.describe_error(error, None if is_dry else run_dir)  # the log is not kept
        record_end(run_dir, error, text)
        row |= {"status": "interrupted" if interrupted else "failed", "error": text}
        if not is_sweep:
            if code == UsageError.exit_code:
                _discard(Path(run_dir))
            # raised through Hydra, it would bring Hydra's own lines
            failures.append(error if isinstance(error, BrokenPipeError) else WorkerError(text, code))
            return None
        print(f"flowtrain: job {row['job']}: {row['error']}", file=sys.stderr)
        if interrupted:
            raise SystemExit(code) from error  # not an Exception: Hydra would start the next job
    finally:
        if is_sweep:
            sweep.append(hydra.sweep.dir, row)


def _run(command: str, cfg: DictConfig, run_dir: str, hydra, is_sweep: bool) -> dict | None:
    entry = COMMANDS[command]
    config = compose.make_config(cfg, entry.config, restored=entry.opens_checkpoint(hydra.job.config_name))
    if entry.trains:
        config = _find_checkpoints(config, Path(run_dir))
        summary = _final_summary(config, Path(run_dir))
        if summary is not None:
            return summary
    arguments = {"command": command, "config": config, "run_dir": run_dir}
    limit = config.job_timeout
    if distributed.world() > 1:  # torchrun: the other ranks wait for this in serve()
        if limit:
            raise UsageError(f"job_timeout={limit:g}: not under torchrun or srun, which manage the processes")
        return worker.execute(**distributed.broadcast_object(arguments))
    alone = config.devices == "auto" and not entry.uses_every_gpu
    count = 1 if alone else distributed.processes(config.devices)
    if count == 1 and not is_sweep and not limit:
        return worker.execute(**arguments)
    logging_config = OmegaConf.to_container(hydra.job_logging, resolve=True)
    return launcher.launch({**arguments, "logging_config": logging_config}, count, limit, _side_by_side(hydra))


def _side_by_side(hydra) -> int:
    """How many jobs of a sweep run at once on this machine: joblib's ``n_jobs``, of which -1 is one a core."""
    jobs = hydra.launcher.get("n_jobs") or 1
    return jobs if jobs > 0 else max(1, distributed.cores() + 1 + jobs)


def _find_checkpoints(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """``config`` with the files to resume and to take weights from, or None."""
    resume = config.resume or None
    if resume is True:
        run = runs.find_run(to_dict(config)) if config.dry_run else run_dir
        file = runs.newest_intact(run / "checkpoints") if run else None
        resume = str(file) if file else None
        if file is None:
            log.info("resume=true: no run of this configuration under %s/, so this is a new one", runs.OUTPUTS)
    init = str(runs.checkpoint_in(config.init, "init")) if config.init else None
    return replace(config, resume=resume, init=init)


def _final_summary(config: TrainConfig, run_dir: Path) -> dict | None:
    """The summary of the run to resume, where it has finished already."""
    if not config.resume or not (resumed := runs.run_of(Path(config.resume))):
        return None
    run_dir = resumed if config.dry_run else run_dir
    summary = runs.final_summary(run_dir, config, Path(config.resume))
    if summary is None and not config.dry_run:
        (run_dir / "summary.json").unlink(missing_ok=True)  # of a run that now gets more steps
    elif summary is not None:
        log.info("%s has finished already", run_dir)
    return summary


def serve() -> None:
    """On ranks above 0 under torchrun or srun: run jobs from rank 0 until there are no more."""
    end_in_kernel()
    while True:
        arguments = distributed.broadcast_object()
        if arguments is None:
            return distributed.close()
        worker.execute(**arguments)


def dismiss() -> None:
    """On rank 0 under torchrun or srun: end the other ranks' :func:`serve`. After an error, torchrun ends them."""
    distributed.broadcast_object(None)
    distributed.close()


def _discard(run_dir: Path) -> None:
    """Remove a new run directory that holds only Hydra's record, the lock and the log of a usage error."""
    if run_dir.is_dir() and {item.name for item in run_dir.iterdir()} <= {
        ".hydra",
        status.LOCK,
        status.NAME,
        "train.log",
    }:
        shutil.rmtree(run_dir)
        outputs = runs.OUTPUTS.absolute()
        for folder in run_dir.absolute().parents:
            if outputs in (folder, *folder.parents):  # never a folder of the user's own
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
