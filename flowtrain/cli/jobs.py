"""One job: what Hydra calls with a composed configuration, and how that runs on one process or on many."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from flowtrain.cli import exit_codes, launcher, worker
from flowtrain.config import compose, runs
from flowtrain.config.schema import RESTORED
from flowtrain.errors import Interrupted, UsageError
from flowtrain.runtime import distributed, status
from flowtrain.runtime.signals import end_in_kernel

log = logging.getLogger("flowtrain")
logging.raiseExceptions = False  # a reader of stdout that has left (| head) is no reason to stop
failures: list[launcher.Failed | BrokenPipeError] = []  # of this process's job, for the command line to report


def job(cfg: DictConfig):
    """Hydra's task function, picklable by name for launchers that run elsewhere."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    command, run_dir = hydra.job.name, hydra.runtime.output_dir
    row = {"job": hydra.job.get("num", 0), "overrides": " ".join(hydra.overrides.task), "run_dir": run_dir}
    begun = time.monotonic()
    ended = partial(status.ended, run_dir) if command == "train" else lambda *how: None
    try:
        summary = _run(command, cfg, run_dir, hydra, sweep)
        ended()
        row = {"status": "finished", "seconds": round(time.monotonic() - begun, 3), **(summary or {}), **row}
        return summary
    except SystemExit as error:  # a signal before training had begun
        ended(error)
        raise
    except Exception as error:
        interrupted = isinstance(error, Interrupted)
        text, code = exit_codes.explain(error, run_dir)
        ended(error, text)
        row |= {"status": "interrupted" if interrupted else "failed", "error": text}
        if not sweep:
            if code == UsageError.exit_code:
                _discard(Path(run_dir))
            # raised through Hydra it would bring Hydra's own lines
            failures.append(error if isinstance(error, BrokenPipeError) else launcher.Failed(text, code))
            return None
        print(f"flowtrain: job {row['job']}: {row['error']}", file=sys.stderr)
        if interrupted:
            raise SystemExit(code) from error  # not an Exception: Hydra would start the next job
    finally:
        if sweep:
            from flowtrain.cli import sweep

            sweep.append(hydra.sweep.dir, row)


def _run(command: str, cfg: DictConfig, run_dir: str, hydra, sweep: bool) -> dict | None:
    restored = hydra.job.config_name in RESTORED
    values = compose.settle(cfg, command, restored)
    if values.get("resume") is True:
        file = runs.to_continue(Path(run_dir) / "checkpoints")
        if file is None:
            log.info("resume=true: no run of this configuration under %s/, so this is a new one", runs.OUTPUTS)
        values["resume"] = str(file) if file else None
    values["resume"] = values.get("resume") or None
    if command == "train" and values["resume"] and runs.run_of(Path(values["resume"])):
        summary = runs.finished(Path(run_dir), values, Path(values["resume"]))
        if summary is not None:
            log.info("%s has finished already", run_dir)
            return summary
        (Path(run_dir) / "summary.json").unlink(missing_ok=True)  # of a run that now gets more steps
    if values.get("init"):
        values["init"] = str(runs.checkpoint_in(values["init"], "init"))
    arguments = {"command": command, "values": values, "run_dir": run_dir}
    limit = values["job_timeout"]
    if distributed.world() > 1:  # torchrun: the other ranks wait for this in serve()
        if limit:
            raise UsageError(f"job_timeout={limit:g}: not under torchrun or srun, which have the processes in hand")
        return worker.execute(**distributed.broadcast_object(arguments))
    count = distributed.processes(values["devices"])
    if count == 1 and not sweep and not limit:
        return worker.execute(**arguments)
    logging_config = OmegaConf.to_container(hydra.job_logging, resolve=True)
    return launcher.launch({**arguments, "logging_config": logging_config}, count, limit)


def serve() -> None:
    """A rank above 0 under torchrun or srun: take jobs from rank 0 until there are no more."""
    end_in_kernel()
    while True:
        arguments = distributed.broadcast_object()
        if arguments is None:
            return distributed.close()
        worker.execute(**arguments)


def dismiss() -> None:
    """Rank 0 under torchrun or srun: there are no more jobs. Not after an error: then the launcher ends the others."""
    distributed.broadcast_object(None)
    distributed.close()


def _discard(run_dir: Path) -> None:
    """Remove a new run directory that holds only Hydra's record, the lock and the log of a refusal."""
    if {item.name for item in run_dir.iterdir()} <= {".hydra", status.LOCK, status.NAME, "train.log"}:
        shutil.rmtree(run_dir)
        if not any(run_dir.parent.iterdir()):
            run_dir.parent.rmdir()
