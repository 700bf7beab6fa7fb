"""Where a run comes from: its configuration beside its preset's, its environment, its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from flowtrain.report.page import Page
from flowtrain.report.run import Configuration, RunRecord

FILES = {  # what lies in a run directory
    "report.html": "this page",
    "summary.json": "the final figures",
    "metrics.jsonl": "every logged number, one object a line",
    "train.log": "what the run printed",
    "environment.json": "versions, device, commit and command",
    "data.json": "where the data lie",
    "status.json": "whether and how the run ended",
    "checkpoints/best.pt": "the weights with the best validation figure",
    "checkpoints/last.pt": "the state at the end, from which resume=true continues",
    "checkpoints/previous.pt": "the state before that",
    ".hydra/config.yaml": "the configuration, as composed",
    "samples": "images drawn while it trained",
    "tb": "TensorBoard's files",
    "eval": "what flowtrain eval wrote",
    "sample": "what flowtrain sample wrote",
}
UNSHOWN = ("resume", "allow", "dist", "job_timeout", "dataset.found")  # what no one chooses


def add(page: Page, record: RunRecord, configuration: Configuration, seconds: float) -> None:
    _configuration(page, configuration)
    _environment(page, record, seconds)
    _files(page, record)


def _configuration(page: Page, configuration: Configuration) -> None:
    section = page.section("Configuration")
    run = dict(_flatten(configuration.config))
    if configuration.preset is not None:
        preset = dict(_flatten(configuration.preset))
        keys = [key for key in {**preset, **run} if run.get(key, "absent") != preset.get(key, "absent")]
        keys = [key for key in keys if not f"{key}.".startswith(tuple(f"{name}." for name in UNSHOWN))]
        keys = [key for key in keys if not _is_filled(key, preset, run)]
        if keys:
            rows = [[key, _show(preset, key), _show(run, key)] for key in keys]
            section.table(["key", "preset", "this run"], rows, f"Differences from {configuration.command}:")
        else:
            section.text(f"Exactly what {configuration.command} composes.")
    if configuration.note:
        section.note(configuration.note)
    section.fold("All keys", yaml.safe_dump(configuration.config, sort_keys=False, allow_unicode=True, width=100))


def _is_filled(key: str, preset: dict, run: dict) -> bool:
    """Whether a mapping is empty on one side only, whose keys on the other are shown."""
    one, other = (preset, run) if key in preset else (run, preset)
    return one[key] == {} and any(name.startswith(f"{key}.") for name in other)


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(values: dict, key: str) -> str:
    if key not in values:
        return "–"
    value = values[key]
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _environment(page: Page, record: RunRecord, seconds: float) -> None:
    section = page.section("Environment")
    found = record.environment
    if record.command:
        section.code(record.command, "To repeat the run:")
    rows = [[name, str(found[key])] for key, name in _NAMES.items() if found.get(key) is not None]
    if rows:
        packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
        section.table(["what", "value"], [*rows, ["packages", packages]])
    elif record.directory is None:
        section.note("A lone checkpoint does not say where it was trained.")
    section.note(f"Computing what this page shows took {seconds:.1f} s.")


_NAMES = {
    "flowtrain": "flowtrain",
    "git": "commit",
    "python": "Python",
    "cuda": "CUDA",
    "device": "device",
    "devices": "processes",
    "threads": "threads of each",
    "deterministic": "deterministic",
    "precision": "precision",
    "platform": "platform",
}


def _files(page: Page, record: RunRecord) -> None:
    section = page.section("Files")
    if record.directory is None:
        section.text(f"Of the checkpoint {record.checkpoint}.")
        return
    rows = []
    for name, what in FILES.items():
        path = record.directory / name
        if name == "report.html" or path.exists():
            rows.append([name + ("/" if path.is_dir() else ""), what, _size(path)])
    section.table(["file", "what it holds", "size"], rows, str(record.directory))
    section.code(f"flowtrain eval ckpt='{record.directory}'\nflowtrain sample ckpt='{record.directory}'")


def _size(path: Path) -> str:
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        return f"{len(files):,} file{'s' * (len(files) != 1)}"
    if not path.is_file():
        return ""
    size = float(path.stat().st_size)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"
