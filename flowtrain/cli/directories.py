"""The directory of a run: what another run has left in it is not replaced."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from flowtrain.commands import Command
from flowtrain.config import runs
from flowtrain.errors import UsageError


def check(command: Command, cfg: DictConfig) -> None:
    """Raise UsageError where ``hydra.run.dir`` holds a run that ``cfg`` does not continue. A directory that flowtrain
    chooses is new and is not looked at: to read its name is to make it. Of sweeps, :mod:`flowtrain.cli.continuation`
    takes care."""
    if runs.dry_run:
        return
    resume = cfg.get("resume") if command.trains else None
    run_dir = _given(cfg)
    if run_dir and is_taken(run_dir, resume):
        raise taken_error(run_dir, "hydra.run.dir=")


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


def _given(cfg: DictConfig) -> str | None:
    """The run directory that the user has set; None where flowtrain makes a new one."""
    raw = OmegaConf.to_container(cfg.hydra.run, resolve=False)["dir"]
    if "${run_dir:" in raw or "${claim:" in raw:
        return None
    setup_globals()  # ${now:…}, ${hydra:…}
    hydra = HydraConfig.instance()
    before = hydra.cfg
    try:
        hydra.set_config(cfg)
        return str(cfg.hydra.run.dir)
    finally:
        hydra.cfg = before
