"""A sweep whose command is typed again goes on: jobs that have finished are skipped, the others run once more.

A sweep is known by its words, in any order, but for those that only say how its jobs run. ``sweep.json`` in its
directory records them. A job is known by its words too, and has to have the same configuration as the run that it left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from flowtrain.cli import hydra_internals, sweep
from flowtrain.commands import COMMANDS
from flowtrain.config import runs
from flowtrain.errors import UsageError
from flowtrain.runtime import files, status

NUMBER = "FLOWTRAIN_JOB"  # of a job that is not launched beside its neighbours, in hydra.job.env_set


@dataclass
class Sweep:
    """The sweep that this process runs.

    Attributes:
        folder: its directory.
        raw: its words.
        is_dry: whether its jobs are dry runs, of which no file is kept.
        ran: whether one of its jobs has been launched.
    """

    folder: Path
    raw: list[str]
    out: object
    is_dry: bool
    ran: bool = False


_current: Sweep | None = None
_held = ExitStack()  # the lock of its directory


def directory(path: str, *, _root_: DictConfig) -> str:
    """The directory of the sweep that these words began, else a new one at ``path``. A command that does not train
    takes little time, and what it reads may have changed: it goes on only with a sweep that has not finished."""
    trains, folder = COMMANDS[_root_.hydra.job.name].trains, Path(path).parent
    for found in sorted(folder.glob(f"*/{sweep.RECORD}"), key=lambda file: runs.start_time(file.parent), reverse=True):
        record = _read(found.parent)
        if record and _is_of(record, _root_):
            return str(found.parent.absolute()) if trains or not record["finished"] else runs.claim(path)
    return runs.claim(path)


def _read(folder: Path) -> dict | None:
    with suppress(OSError, ValueError):
        record = json.loads((folder / sweep.RECORD).read_text())
        if isinstance(record, dict) and {"command", "words", "finished"} <= record.keys():
            return record
    return None


def _is_of(record: dict, config: DictConfig) -> bool:
    return record["command"] == config.hydra.job.name and sorted(record["words"]) == sorted(_words(config))


def _words(config: DictConfig) -> list[str]:
    overrides = OmegaConf.to_container(config.hydra.overrides, resolve=False)  # a word may hold an interpolation
    return sweep.without_free([*overrides["task"], *overrides["hydra"]])


def begin(config: DictConfig) -> None:
    """Before the sweeper of a sweep is made: lock its directory and record its words.

    Raises:
        UsageError: the directory holds another sweep, or this one is being run.
    """
    global _current
    _seed_sampler(config)
    folder = Path(config.hydra.sweep.dir)
    with open_dict(config):  # for its jobs, whose configurations are composed anew from the words
        config.hydra.sweep.dir = str(folder)
        quoted = QuotedString(str(folder), Quote.single).with_quotes()
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted}")
    record = _read(folder)
    if record and not _is_of(record, config) or not record and (folder / sweep.RESULTS).exists():
        raise UsageError(f"hydra.sweep.dir={folder}: holds a sweep of another command; choose another directory")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _held.enter_context(status.lock_file(folder))
    except status.RunLocked as holder:
        raise UsageError(
            f"{folder}: this sweep is being run by {holder}; for another one, hydra.sweep.dir=DIR"
        ) from None
    words = record["words"] if record else _words(config)
    with open_dict(config):  # in the order in which they were typed first, so that jobs keep their numbers
        task = config.hydra.overrides.task
        config.hydra.overrides.task = sorted(task, key=lambda word: words.index(word) if word in words else len(words))
    _write(folder, config.hydra.job.name, words, finished=False)
    params = config.hydra.sweeper.get("params") or {}
    raw = [*config.hydra.overrides.task, *(f"{key}={value}" for key, value in params.items())]
    _current = Sweep(folder, raw, sweep.output(bool(config.get("json"))), bool(config.get("dry_run")))


def _write(folder: Path, command: str, words: list[str], finished: bool) -> None:
    files.write_json(folder / sweep.RECORD, {"command": command, "words": words, "finished": finished})


def _seed_sampler(config: DictConfig) -> None:
    """Seed a search that has no seed with ``seed``, so that it suggests the same values when it goes on."""
    sampler = config.hydra.sweeper.get("sampler")
    if sampler is not None and "seed" in sampler and sampler.seed is None:
        with open_dict(config):
            sampler.seed = config.get("seed", 1)


class LauncherOfMissing(Launcher):
    """Launches only the jobs that have not finished before, by another launcher."""

    def __init__(self, launcher: Launcher, hydra_context, config: DictConfig):
        self.launcher, self.loader, self.config = launcher, hydra_context.config_loader, config

    def setup(self, **_) -> None:
        """Nothing: the other launcher is set up."""

    def launch(self, job_overrides, initial_job_idx: int) -> list[JobReturn]:
        words = dict(enumerate(map(list, job_overrides), initial_job_idx))
        returns = {}
        for number, row in _finished(words, self.config, self.loader):
            print(f"flowtrain: job {number}: finished before, skipped", file=sys.stderr)
            value = sweep.figure(row)
            returns[number] = JobReturn(overrides=words[number], status=JobStatus.COMPLETED, _return_value=value)
        missing = [number for number in words if number not in returns]
        if missing and _current:
            _current.ran = True
        for group in _groups(missing, apart=hydra_internals.is_sequential(self.launcher)):
            if group == [*range(group[0], group[-1] + 1)]:
                done = self.launcher.launch([words[number] for number in group], initial_job_idx=group[0])
            else:
                numbered = [[*words[number], f"+hydra.job.env_set.{NUMBER}={number}"] for number in group]
                done = self.launcher.launch(numbered, initial_job_idx=0)
            returns |= dict(zip(group, done))
        return [returns[number] for number in words]


def number_of(hydra: DictConfig) -> int:
    """The number of a job in its sweep."""
    return int(hydra.job.env_set.get(NUMBER, hydra.job.get("num", 0)))


def _groups(numbers: list[int], apart: bool) -> Iterator[list[int]]:
    """``numbers`` as one group; or, where jobs run one after another anyway, as runs of successive numbers."""
    group: list[int] = []
    for number in numbers:
        if group and apart and number != group[-1] + 1:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _finished(words: dict[int, list[str]], config: DictConfig, loader) -> Iterator[tuple[int, dict]]:
    """The number and the row of each job that has finished with the configuration that it has now."""
    rows = {tuple(sweep.words_of(row)): row for row in sweep.read(Path(config.hydra.sweep.dir))}
    for number, own in words.items():
        row = rows.get(tuple(sorted(sweep.without_free(own))))
        if row and row["status"] == "finished":
            composed = OmegaConf.to_container(loader.load_sweep_config(config, own), resolve=False)
            if _comparable(composed) == _comparable(_stored(Path(row["run_dir"]))):
                yield number, row


def _stored(run_dir: Path) -> dict:
    with suppress(OSError, yaml.YAMLError):
        return OmegaConf.to_container(OmegaConf.load(run_dir / ".hydra" / "config.yaml"), resolve=False)
    return {}


def _comparable(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in (*sweep.FREE, "hydra")}


def _conclude(current: Sweep) -> int:
    """Print the table of a sweep; its exit code."""
    rows = sweep.read(current.folder)
    if current.is_dry:
        sweep.conclude_dry(rows, current.out)
    else:
        sweep.conclude(current.folder, rows, current.raw, current.out)
    return int(any(row["status"] == "failed" for row in rows))


@contextmanager
def concluded() -> Iterator[list[int]]:
    """Within it a sweep may run. Afterwards its table is printed; the list then holds the exit code, 1 after a failed
    job."""
    global _current
    codes: list[int] = []
    try:
        try:
            yield codes
        except ValueError:  # of a sweeper that searches, where no job has a figure
            if not _current or any(row["status"] == "finished" for row in sweep.read(_current.folder)):
                raise
        if _current and (_current.folder / sweep.RESULTS).exists():
            codes.append(_conclude(_current))
            record = _read(_current.folder)
            if record and not codes[0]:
                _write(_current.folder, record["command"], record["words"], finished=True)
            if not _current.ran:
                print("every job had finished before; hydra.sweep.dir=DIR runs them anew", file=_current.out)
    finally:
        _current = None
        _held.close()


OmegaConf.register_new_resolver("sweep_dir", directory, replace=True)
hydra_internals.before_sweeps(begin, LauncherOfMissing)
