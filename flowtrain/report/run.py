"""What a run directory says of its run: curves, final figures, evaluations, environment, command."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowtrain.errors import FlowtrainError


@dataclass(frozen=True)
class Curve:
    """Values of a metric at steps, (n,) each."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RunRecord:
    """Attributes:
    directory: of the run; None of a lone checkpoint.
    checkpoint: the file.
    metrics: by name, such as ``val/bits_per_dim``.
    summary, environment: as the files have them, {} where they are missing.
    overrides: the words of the command line; None where they are unknown.
    evaluations: what each ``eval/<time>/eval.json`` holds, by its path in the run, the oldest first.
    """

    directory: Path | None
    checkpoint: Path
    metrics: dict[str, Curve] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    overrides: list[str] | None = None
    evaluations: dict[str, dict] = field(default_factory=dict)

    @property
    def command(self) -> str | None:
        """The command that repeats the run."""
        if self.overrides is None:
            return None
        return shlex.join(["flowtrain", "train", *(word for word in self.overrides if not word.startswith("resume="))])

    def evaluation(self, split: str) -> tuple[str, dict] | None:
        """The newest evaluation of this checkpoint on all of a split, and its path in the run."""
        for path, found in reversed(self.evaluations.items()):
            same = Path(str(found.get("checkpoint"))).name == self.checkpoint.name
            newer = (self.directory / path).stat().st_mtime >= self.checkpoint.stat().st_mtime
            if same and newer and found.get("split") == split:
                return path, found
        return None


def read_run(directory: Path | None, checkpoint: Path) -> RunRecord:
    """Read the records of a run. A file that is not there is left out.

    Raises:
        FlowtrainError: a file is damaged; it is named.
    """
    if directory is None:
        return RunRecord(None, checkpoint)
    evaluations = sorted(directory.glob("eval/*/eval.json"), key=lambda path: path.stat().st_mtime)
    return RunRecord(
        directory,
        checkpoint,
        read_metrics(directory / "metrics.jsonl"),
        _read_json(directory / "summary.json"),
        _read_json(directory / "environment.json"),
        _read_overrides(directory / ".hydra" / "overrides.yaml"),
        {str(path.relative_to(directory)): _read_json(path) for path in evaluations},
    )


def read_metrics(path: Path) -> dict[str, Curve]:
    """The curves in metrics.jsonl, by their names, in the order of their steps. Where a resumed run wrote a step twice,
    the later line counts. Half a line at the end, which a kill leaves, is no line.

    >>> path = Path(getfixture("tmp_path")) / "metrics.jsonl"
    >>> _ = path.write_text('{"step": 1, "loss": 3.0}\\n{"step": 2, "loss": NaN}\\n{"step": 1, "loss": 2.0}\\n{"ste')
    >>> curve = read_metrics(path)["loss"]
    >>> curve.steps.tolist(), curve.values.tolist()
    ([1.0, 2.0], [2.0, nan])
    """
    points: dict[str, dict[float, float]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            step = float(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(name, {})[step] = float(value)
    return {
        name: Curve(np.array(sorted(found)), np.array([found[step] for step in sorted(found)]))
        for name, found in points.items()
    }


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def _read_overrides(path: Path) -> list[str] | None:
    """Hydra's record of the words of a command line."""
    if not path.is_file():
        return None
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise FlowtrainError(f"{path}: cannot be read ({error})") from error
    return [str(word) for word in found or []]


@dataclass(frozen=True)
class Configuration:
    """Attributes:
    config: of the run, as plain values.
    preset: what its preset alone composes; None where that is unknown.
    command: that composes the preset, such as ``flowtrain train model=glow dataset=digits``.
    note: what else must be said, or "".
    """

    config: dict
    preset: dict | None = None
    command: str = ""
    note: str = ""
