"""Run directories under ``outputs/`` and the checkpoints in them.

A run is ``outputs/<dataset>-<model>/<date>_<time>[_n]``, a job of a sweep ``outputs/sweeps/<date>_<time>/<job>_…``;
``checkpoints/`` inside holds last, previous and best.pt, and ``summary.json`` appears when the run has finished.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from datetime import datetime
from pathlib import Path

from flowtrain.config import earlier
from flowtrain.config.schema import TrainConfig
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import status

log = logging.getLogger("flowtrain")

OUTPUTS = Path("outputs")  # in the working directory
BEST = ("best.pt", "last.pt", "previous.pt")
LAST = ("last.pt", "previous.pt", "best.pt")
RECORD = Path(".hydra", "config.yaml")  # what Hydra writes when a run starts
# keys that may differ between a run and its continuation
FREE = ("resume", "devices", "threads", "dist", "job_timeout", "max_steps", "max_minutes")
FREE += ("dry_run", "report", "logger")

dry_run = False  # True: make no directories, the configuration is only shown


def claim(path: str) -> str:
    """Make the directory ``path``, or ``path_2``, ``path_3`` … where it exists; its absolute path."""
    n = 1
    while not dry_run:
        new = Path(path if n == 1 else f"{path}_{n}").absolute()
        try:
            new.mkdir(parents=True)
        except FileExistsError:
            n += 1
        else:
            return str(new)
    return str(Path(path).absolute())


def run_of(file: Path) -> Path | None:
    """The run directory of a checkpoint or of a divergence record; None for a lone file."""
    return file.parent.parent if file.parent.name in ("checkpoints", "divergence", RECORD.parent.name) else None


def holds_run(folder: Path) -> bool:
    """Whether a directory has the records of a training run, which another run there would replace."""
    records = ("summary.json", "metrics.jsonl")
    return has_checkpoint(folder) or any((folder / name).exists() for name in records)


def has_checkpoint(run: Path) -> bool:
    return any(run.glob("checkpoints/*.pt"))


def output_path(file: str, command: str) -> str:
    """Where a command writes its results on a checkpoint: into the checkpoint's run, else under outputs/."""
    return str((run_of(Path(file)) or OUTPUTS) / command)


def start_time(run: Path) -> tuple[float, int]:
    """A key that sorts runs by when they started: the time in the name, else that of Hydra's record."""
    name = re.fullmatch(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?", run.name)
    if name:
        return datetime.strptime(name[1], "%Y-%m-%d_%H-%M-%S").timestamp(), int(name[2] or 1)
    record = run / ".hydra" / "config.yaml"
    return (record if record.exists() else run).stat().st_mtime, 0


def newest_first() -> list[Path]:
    """Every run under ``outputs/`` that has checkpoints."""
    return sorted((folder.parent for folder in OUTPUTS.rglob("checkpoints")), key=start_time, reverse=True)


def checkpoint_in(path: str, key: str, names=BEST) -> Path:
    """The checkpoint at ``path``: a file, or the first of ``names`` in a run directory. Raises UsageError."""
    given = Path(path).expanduser()
    if given.is_file():
        return given.resolve()
    if not given.is_dir():
        siblings = [item.name for item in given.parent.iterdir()] if given.parent.is_dir() else []
        near = difflib.get_close_matches(given.name, siblings, 1)
        hint = f"; did you mean {given.parent / near[0]}?" if near else ""
        raise UsageError(f"{key}={path}: no such file or directory{hint}")
    for name in names:
        for file in (given / "checkpoints" / name, given / name):
            if file.is_file():
                return file.resolve()
    raise UsageError(f"{key}={path}: not a run directory: it has no checkpoints/{names[0]} or {names[1]}")


def run_to_repeat(path: str) -> Path:
    """What holds the configuration of the run at ``path``: its newest intact checkpoint, or where it has none Hydra's
    record; or a lone checkpoint. Raises UsageError."""
    given = Path(path).expanduser()
    if not given.is_dir():
        return checkpoint_in(path, "run")
    for folder in (given / "checkpoints", given):
        file, problems = _first_intact(folder, [name for name in LAST if (folder / name).is_file()])
        if problems:
            log.warning("%s", "; ".join(problems))
        if file:
            return file.resolve()
    if trained_in(given):
        return (given / RECORD).resolve()
    inside = sorted((one for one in given.iterdir() if one.is_dir() and trained_in(one)), key=start_time)
    what = f"holds runs; name one of them, such as {inside[-1]}" if inside else "not a run directory"
    raise UsageError(f"run={path}: {what}" + ("" if inside else ": it has neither checkpoints nor .hydra/config.yaml"))


def trained_in(folder: Path) -> bool:
    """Whether a folder has Hydra's record of a training run."""
    return (folder / RECORD).is_file() and (folder / status.NAME).is_file()


def newest_to_repeat() -> Path:
    """What holds the configuration of the run under ``outputs/`` that started last. Raises UsageError."""
    found = {*newest_first(), *(folder.parent.parent for folder in OUTPUTS.rglob(str(RECORD)))}
    for run in sorted(found, key=start_time, reverse=True):
        if has_checkpoint(run) or trained_in(run):
            return run_to_repeat(str(run))
    raise UsageError("there is no run under outputs/ here: give run=PATH, or train one first")


def repeated_path(file: str) -> str:
    """Where the repetition of a run goes: beside the runs of the same data and model, else under outputs/reruns."""
    run = run_of(Path(file))
    for folder in (run, run.parent) if run else ():
        if name := re.fullmatch(r"(?:\d+_)?([a-z]\w*-\w+)", folder.name):
            return str(OUTPUTS / name[1])
    return str(OUTPUTS / "reruns")


def divergence_record(path: str) -> Path:
    """The record of a step that diverged. Raises UsageError."""
    given = Path(path).expanduser()
    if not given.is_file():
        raise UsageError(f"replay={path}: no such file; a run that diverged names it in its last line")
    return given.resolve()


def newest_checkpoint() -> Path:
    """The best checkpoint of the run under ``outputs/`` that started last and has an intact one."""
    for run in newest_first():
        file, problems = best_intact(run)
        if problems:
            log.warning("%s", "; ".join(problems))
        if file:
            return file.resolve()
    raise UsageError("there is no run with a checkpoint under outputs/ here: give ckpt=PATH, or train one first")


def best_intact(run: Path) -> tuple[Path | None, list[str]]:
    """The best intact checkpoint of a run, or None; and what is wrong with those before it."""
    folder = run / "checkpoints"
    return _first_intact(folder, [name for name in BEST if (folder / name).exists()])


def newest_intact(folder: Path) -> Path | None:
    """The newest intact checkpoint of a run, after a warning where a newer one is damaged."""
    file, problems = _first_intact(folder, LAST)
    if file and problems:
        log.warning("%s; continuing from %s", "; ".join(problems), file.name)
    return file


def checkpoint_to_resume(path: str) -> Path:
    """The checkpoint that ``resume=path`` means: that file, or a run's newest intact one. Raises UsageError."""
    file = checkpoint_in(path, "resume", LAST)
    return file if Path(path).expanduser().is_file() else newest_intact(file.parent) or file


def _first_intact(folder: Path, names) -> tuple[Path | None, list[str]]:
    """The first of ``names`` in ``folder`` that is intact, or None; and what is wrong with those before it."""
    from flowtrain.runtime import checkpoint

    problems = []
    for name in names:
        try:
            checkpoint.check(folder / name)
        except FlowtrainError as error:
            problems.append(str(error))
        else:
            return folder / name, problems
    return None, problems


def find_run(config: dict) -> Path | None:
    """The newest run under ``outputs/`` with this configuration; the keys in FREE may differ."""
    from flowtrain.runtime import checkpoint

    def without_free(config):
        free = {key: value for key, value in config.items() if key not in FREE}
        return free | {"dataset": {key: value for key, value in config["dataset"].items() if key != "found"}}

    for run in newest_first():
        file, problems = _first_intact(run / "checkpoints", LAST)
        if file is None and any((run / "checkpoints").glob("*.pt")):
            log.warning("no checkpoint of %s can be used: %s", run, "; ".join(problems))
        try:
            if file and without_free(earlier.update(checkpoint.read_config(file))) == without_free(config):
                return run.resolve()
        except FlowtrainError as error:  # of another version of flowtrain
            log.warning("no checkpoint of %s can be used: %s", run, error)
    return None


def final_summary(run: Path, config: TrainConfig, file: Path) -> dict | None:
    """The summary of a run that has finished; None where ``config`` allows it more steps or minutes than it had."""
    from flowtrain.runtime import checkpoint

    path = run / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text())
    except ValueError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error})") from error
    had = checkpoint.read_config(file)

    def more(now, then):
        return then is not None and (now is None or now > then)

    limits = [(getattr(config, key), had[key]) for key in ("max_steps", "max_minutes")]
    limits += [(getattr(config.trainer, key), had["trainer"][key]) for key in ("max_epochs", "patience")]
    return None if any(more(now, then) for now, then in limits) else summary
