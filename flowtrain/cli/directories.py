"""The directories of a command line: what a run or a sweep has left in one is not replaced."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from flowtrain.cli import sweep
from flowtrain.commands import Command
from flowtrain.config import runs
from flowtrain.errors import UsageError


def check(command: Command, cfg: DictConfig) -> None:
    """Raise UsageError where ``hydra.run.dir`` holds a run or ``hydra.sweep.dir`` a sweep that ``cfg`` does not
    continue. A directory that flowtrain chooses is new and is not looked at: to read its name is to make it."""
    if runs.dry_run:
        return
    resume = cfg.get("resume") if command.trains else None
    run_dir, sweep_dir = _given(cfg, "run"), _given(cfg, "sweep")
    if run_dir and is_taken(run_dir, resume):
        raise taken_error(run_dir, "hydra.run.dir=")
    if sweep_dir and not resume and any((Path(sweep_dir) / name).exists() for name in sweep.FILES):
        raise UsageError(
            f"hydra.sweep.dir={sweep_dir}: holds a sweep, whose results these would join; choose another directory"
            + (", or continue that one with resume=true" if command.trains else "")
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
    """The directory of a "run" or a "sweep" that the user has set; None where flowtrain makes a new one."""
    raw = OmegaConf.to_container(cfg.hydra[kind], resolve=False)["dir"]
    if "${run_dir:" in raw or "${claim:" in raw:
        return None
    setup_globals()  # ${now:…}, ${hydra:…}
    hydra = HydraConfig.instance()
    before = hydra.cfg
    try:
        hydra.set_config(cfg)
        return str(cfg.hydra[kind].dir)
    finally:
        hydra.cfg = before
