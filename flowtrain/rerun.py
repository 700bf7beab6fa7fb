"""``flowtrain rerun``: a run once more, from its directory, and what differs from the first time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from flowtrain import train
from flowtrain.commands import RerunConfig
from flowtrain.config import restore, runs
from flowtrain.config.conversion import format_value, to_dict, validate
from flowtrain.config.schema import TrainConfig
from flowtrain.runtime import checkpoint, distributed, environment
from flowtrain.training.recorded import Recorded
from flowtrain.training.setup import SetUp

log = logging.getLogger("flowtrain")

HERE = ("resume", "allow", "dist", "job_timeout", "dry_run")  # keys that are of no run but of a command line
PLACES = ("root", "path", "download", "found")  # of dataset: where the data lie, not what they are


def main(config: RerunConfig, run_dir: str) -> dict:
    """Train what the run at ``config.run`` trained into ``run_dir``; returns the summary, on every process."""
    file = Path(config.run)
    values = to_dict(config)
    values.pop("run")
    again = validate(TrainConfig, values)
    state = None if file.suffix == ".yaml" else checkpoint.read(file, mmap=True)

    def look(run: SetUp) -> None:
        if distributed.is_main():
            first = runs.run_of(file)
            log.info("repeats %s", first or file)
            found = [*_settings(again, file), *_environment(first, run.device, again), *_data(state, run)]
            for line in found:
                log.info("differs: %s", line)
            if not found:
                log.info("nothing differs%s", _promise(again, run))

    return train.main(again, run_dir, look, Recorded.of(state or {}))


def _promise(config: TrainConfig, run: SetUp) -> str:
    if run.device.type != "cpu" and not config.deterministic:
        return "; on a GPU only deterministic=true gives the same bits"
    if config.max_minutes:
        return "; the weights do, since max_minutes lets the clock set the learning rate"
    return ": the weights will be the same to the bit"


def _settings(config: TrainConfig, file: Path) -> Iterator[str]:
    """Keys that were changed on the command line."""
    allow = config.allow
    first = to_dict((restore.record_config if file.suffix == ".yaml" else restore.checkpoint_config)(file, allow))
    if first["batch_size"] == "auto":
        first["batch_size"] = restore.measured_batch_size(file) or "auto"
    yield from _changes(first, to_dict(config))


def _changes(first, now, key: str = "") -> Iterator[str]:
    if isinstance(first, dict) and isinstance(now, dict):
        skipped = HERE if not key else PLACES if key == "dataset" else ()
        for name in sorted({*first, *now} - {*skipped}):
            yield from _changes(first.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif first != now:
        yield f"{key}={format_value(now)}, then {format_value(first)}"


def _environment(run: Path | None, device: torch.device, config: TrainConfig) -> Iterator[str]:
    """What the first run's environment.json says otherwise than this process."""
    first = environment.read(run) if run else None
    if first is None:
        yield f"unknown: there is no {environment.NAME} that says commit and versions of the first time"
        return
    now = environment.describe(device)
    commits = [
        (str(each.get("git")).removesuffix("-dirty"), str(each.get("git")).endswith("-dirty")) for each in (first, now)
    ]
    (old, was_dirty), (new, is_dirty) = commits
    if old != new:
        yield f"commit {new}, then {old}"
    if was_dirty or is_dirty:
        when = "now and then" if was_dirty and is_dirty else "now" if is_dirty else "then"
        yield f"the code had changes beyond its commit {when}, which may not be the same"
    for key in ("flowtrain", "python", "cuda", "device", "devices", "deterministic", "platform"):
        if first.get(key) != now[key]:
            yield f"{key} {now[key]}, then {first.get(key)}"
    packages = first.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    for name in sorted({*packages, *now["packages"]}):
        if packages.get(name) != now["packages"].get(name):
            yield f"{name} {now['packages'].get(name, 'is missing')}, then {packages.get(name, 'not recorded')}"
    threads = first.get("threads")
    if config.threads != "auto" and threads != now["threads"]:
        yield f"threads {now['threads']}, then {threads}"
    if config.threads == "auto" and isinstance(threads, int) and threads > now["threads"]:
        yield f"threads at most {now['threads']}, then {threads}"


def _data(state: dict | None, run: SetUp) -> Iterator[str]:
    """Whether the train split is another than the checkpoint says."""
    loader = (state or {}).get("loader")
    if not isinstance(loader, dict):
        return
    if loader.get("examples") != len(run.train):
        yield f"{len(run.train):,} train examples, then {loader.get('examples'):,}"
    elif loader.get("data") != (digest := run.train.digest()):
        yield f"the train split, whose SHA-256 is {digest}, then {loader.get('data')}"
