"""The directory of a run: what another run has left in it is not replaced."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from flowtrain.commands import Command
from flowtrain.config import runs
from flowtrain.errors import FlowtrainError, UsageError

place: Path | None = None  # an existing folder on the disk of the run directory, of a dry run in this process


def check(command: Command, cfg: DictConfig) -> None:
    """Raise UsageError where ``hydra.run.dir`` holds a run that ``cfg`` does not continue. A directory that flowtrain
    chooses is new and is not looked at: to read its name is to make it. Of sweeps, :mod:`flowtrain.cli.continuation`
    takes care."""
    if runs.dry_run:
        return
    resume = cfg.get("resume") if command.trains else None
    run_dir = _given(cfg, "run")
    if run_dir and is_taken(run_dir, resume):
        raise taken_error(run_dir, "hydra.run.dir=")


def check_place(cfg: DictConfig) -> None:
    """Raise UsageError where a dry run's run could not make its directory, or computes on a machine that does not share
    this one's temporary files."""
    global place
    if "submitit" in str(cfg.hydra.launcher.get("_target_")):
        raise UsageError("dry_run=true: measures on this machine; leave launcher=submitit out, or start it in a job")
    kind = "sweep" if cfg.hydra.mode == RunMode.MULTIRUN else "run"
    place = Path(_given(cfg, kind) or runs.OUTPUTS).absolute()
    while not place.exists():
        place = place.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".flowtrain-", dir=place))
    except OSError as error:
        raise UsageError(f"{place}: no run directory can be made there ({error.strerror})") from error


def check_room(needed: int) -> None:
    """Raise FlowtrainError where the disk of the run directory lacks ``needed`` bytes for the checkpoints."""
    if place and (free := shutil.disk_usage(place).free) < needed:
        raise FlowtrainError(f"{place}: the checkpoints need {needed:,} bytes, {free:,} are free")


@contextmanager
def temporary_outputs() -> Iterator[tuple[str, ...]]:
    """The words with which a dry run writes into a temporary directory, which is then removed."""
    with tempfile.TemporaryDirectory(prefix="flowtrain-", ignore_cleanup_errors=True) as folder:
        yield (
            f"hydra.run.dir='{folder}/run'",
            f"hydra.sweep.dir='{folder}/sweep'",
            "hydra.sweep.subdir=${hydra.job.num}",
            "hydra.output_subdir=null",
        )


def is_taken(run_dir: str, resume: bool | str | None) -> bool:
    """Whether ``run_dir`` holds a run that ``resume`` does not continue."""
    folder = Path(os.path.abspath(run_dir))
    return resume is not True and runs.holds_run(folder) and not (resume and _is_of(resume, folder))


def taken_error(run_dir: str, key: str = "") -> UsageError:
    folder = Path(os.path.abspath(run_dir))
    resume = f", or continue that one with resume='{run_dir}'" if runs.has_checkpoint(folder) else ""
    return UsageError(f"{key}{run_dir}: holds a run, which this one would replace; choose another directory{resume}")


def _is_of(checkpoint: str, folder: Path) -> bool:
    run = runs.run_of(Path(checkpoint))
    return run is not None and run.resolve() == folder.resolve()


def _given(cfg: DictConfig, kind: str) -> str | None:
    """The directory of a "run" or a "sweep" that the user has set; None where flowtrain chooses one."""
    raw = OmegaConf.to_container(cfg.hydra[kind], resolve=False)["dir"]
    if any(f"${{{name}:" in raw for name in ("run_dir", "claim", "sweep_dir")):
        return None
    setup_globals()  # ${now:…}, ${hydra:…}
    hydra = HydraConfig.instance()
    before = hydra.cfg
    try:
        hydra.set_config(cfg)
        return str(cfg.hydra[kind].dir)
    finally:
        hydra.cfg = before
