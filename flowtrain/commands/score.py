"""``flowtrain score``: the log-likelihood of each row or image of a user's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.ode import exact_trace, needs_exact_trace
from flowtrain.commands import ScoreConfig
from flowtrain.commands.outputs import open_table, progress, table_path
from flowtrain.commands.restored import Restored, restore
from flowtrain.data.image_sources import SUFFIXES
from flowtrain.data.inputs import (
    ARCHIVES,
    TABLES,
    Group,
    ImageFiles,
    Input,
    TableRows,
    input_path,
    open_arrays,
    unnamed_columns,
)
from flowtrain.data.labels import class_number, label_context, list_classes
from flowtrain.data.spec import class_names
from flowtrain.engine.evaluate import evaluation_mode, log_likelihoods
from flowtrain.engine.memory_budget import few_rows, rows_within_budget
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow, to_bits_per_dim
from flowtrain.runtime import distributed, files

ARRAYS = "an array (npy, npz, h5, zarr)"


@torch.no_grad()
def main(config: ScoreConfig, run_dir: str) -> dict:
    """Score ``config.input`` into ``config.output`` and print a summary, also written as score.json into ``run_dir``.

    Raises:
        UsageError: the input does not fit the model; nothing has been scored.
        FlowtrainError: an example cannot be read or has no finite likelihood, and ``config.on_bad`` is not skip.
    """
    output = table_path(config.output, Path(run_dir) / "scores.csv")
    if config.input and output.exists() and output.samefile(input_path(config.input)):
        raise UsageError(f"output={config.output}: is the input itself")
    restored = restore(config, config.ckpt, config.weights)
    flow = restored.flow.eval()
    source = _source(config, restored)
    label = _label(config, restored, source)
    tally, scorer = Tally(), Scorer(config, flow, source, label)
    groups = source.groups(distributed.rank(), distributed.world())
    with (
        open_table(output) if distributed.is_main() else nullcontext() as write,
        progress(None, source.label) as bar,
        evaluation_mode(next(flow.parameters()).device),
        exact_trace() if needs_exact_trace(flow) else nullcontext(),
    ):
        while True:
            group = next(groups, None)
            turns = distributed.all_gather_object(None if group is None else scorer(group))
            turns = [turn for turn in turns if turn is not None]
            if not turns:
                break
            for names, log_probs, problems in turns if write else ():
                tally.add(log_probs, problems)
                write({source.label: names, **_figures(log_probs, flow, restored.has_bits)})
                bar.update(len(names))
    if not distributed.is_main():
        return {}
    report = {
        "rows": tally.scored + tally.skipped,
        "skipped": tally.skipped,
        **({"first_skipped": tally.first_skipped} if tally.skipped else {}),
        **{name: _number(mean) for name, mean in _figures(tally.mean, flow, restored.has_bits).items()},
        "log_likelihood_stderr": _number(tally.stderr),
        "draws": config.draws,
        **({"lower_bound": True} if restored.dataset.spec.has_gaps else {}),
        "input": config.input,
        "output": str(output),
        "weights": restored.weights,
        "checkpoint": config.ckpt,
    }
    files.write_json(Path(run_dir) / "score.json", report)
    print(json.dumps(report, indent=2) if config.json else table(report), flush=True)
    return report


# ---- input ---------------------------------------------------------------------------------------------------------


def _source(config: ScoreConfig, restored: Restored) -> Input:
    """The reader of ``config.input``. Raises UsageError where that is not the model's kind of data."""
    if not config.input:
        raise UsageError(f"input=PATH is needed: {TABLES}, or a folder, .zip, .tar or array of images")
    path, data = input_path(config.input), restored.dataset
    grey_levels = data.spec.grey_levels
    suffix = "" if path.is_dir() else path.suffix.lower()
    if restored.columns is None and (arrays := open_arrays(path, data, config.on_bad)):
        return arrays
    if not data.spec.is_image:
        columns = restored.columns or unnamed_columns(restored.flow.dimensions, grey_levels)
        return TableRows(path, columns, config.on_bad, data)
    if grey_levels is None:
        raise UsageError(f"input={config.input}: this model takes real numbers: {ARRAYS}")
    if suffix and suffix not in (*ARCHIVES, *SUFFIXES) or not suffix and not path.is_dir():
        raise UsageError(
            f"input={config.input}: this model takes a folder, .zip or .tar of images, an image, or {ARRAYS}"
        )
    if grey_levels & (grey_levels - 1) or grey_levels > 256:
        raise UsageError(
            f"input={config.input}: this model has {grey_levels} grey levels: give {ARRAYS}, of 0 … {grey_levels - 1}"
        )
    return ImageFiles(
        path,
        data.spec.shape,
        8 - int(math.log2(grey_levels)),
        config.on_bad,
        getattr(data, "box", None),
        getattr(data, "exact", False),
        config.trainer.workers,
    )


def _label(config: ScoreConfig, restored: Restored, source: Input) -> Tensor | None:
    """The context of all examples, (1, classes), or None where there is none or the file has it."""
    shape, names = restored.flow.context_shape, class_names(restored.dataset.spec)
    if shape is None or restored.columns:
        if config.label is not None:
            raise UsageError(f"label={config.label}: this model is not class-conditional; leave label=null")
        return None
    if config.label is not None:
        return label_context(torch.tensor([class_number(config.label, shape[0], names)]), shape[0])
    if names and isinstance(source, ImageFiles) and source.find_labels(names):
        return None
    folders = ", or a folder for each class" if isinstance(source, ImageFiles) else ""
    raise UsageError(f"label=null: give the class, {list_classes(names) or f'0 to {shape[0] - 1}'}{folders}")


class Scorer:
    """Scores groups of examples: (names, log-likelihoods, NaN where there is none, a line for each of those).

    ``label`` is the context of all examples, or None.
    """

    def __init__(self, config: ScoreConfig, flow: Flow, source: Input, label: Tensor | None):
        self.config, self.flow, self.source, self.label = config, flow, source, label
        self.batch = None if config.batch == "auto" else config.batch

    def __call__(self, group: Group) -> tuple[np.ndarray, np.ndarray, list[str]]:
        where = f"{self.config.input}: from {self.source.label}"
        try:
            values = self._log_likelihoods(group)
        except FloatingPointError as error:
            raise FlowtrainError(f"{where} {group.names[0]} on: {error}") from error
        values[list(group.bad)] = math.nan
        problems = dict(group.bad)
        for place in (~values.isfinite()).nonzero().flatten().tolist():
            if place not in problems:
                name = group.names[place]
                name = f"row {name} (the first is 1)" if self.source.label == "row" else name
                why = self.flow.explain(group.x[place])
                problems[place] = f"{name}: its log-likelihood is {values[place]:g}{why}"
                self.source.refuse(f"{self.config.input}: {problems[place]}")
                values[place] = math.nan
        return group.names, values.numpy(), [problems[place] for place in sorted(problems)]

    def _log_likelihoods(self, group: Group) -> Tensor:
        """float64 (B,) on the CPU; the noise of an example is that of its number."""
        values, device = torch.empty(len(group.x), dtype=torch.float64), next(self.flow.parameters()).device
        less = "a smaller batch=N would need less"
        if self.batch is None and len(values):
            few = min(few_rows(self.flow.dimensions), len(values))
            work = self._batches(group, few)
            with out_of_memory(device, f"{few} likelihoods at once", less):
                self.batch = rows_within_budget(lambda: next(work), few, device)
        size, start = self.batch or 1, 0
        with out_of_memory(device, f"{min(size, len(values))} likelihoods at once", less):
            for part in self._batches(group, size):
                values[start : start + len(part)] = part
                start += len(part)
        return values

    def _batches(self, group: Group, size: int) -> Iterator[Tensor]:
        device = next(self.flow.parameters()).device
        context = group.context if self.label is None else self.label.expand(len(group.x), -1)
        for start in range(0, len(group.x), size):
            part = slice(start, start + size)
            x, given = group.x[part].to(device), None if context is None else context[part].to(device)
            index = torch.arange(group.first + start, group.first + start + len(x), device=device)
            yield log_likelihoods(self.flow, index, x, given, self.config.draws, self.config.seed)[0].cpu()


def _figures(log_prob, flow: Flow, has_bits: bool) -> dict:
    """The log-likelihood and, for integers, bits per dimension."""
    bits = {"bits_per_dim": to_bits_per_dim(log_prob, flow.dimensions)} if has_bits else {}
    return {"log_likelihood": log_prob, **bits}


def _number(value: float) -> float | None:
    """None for NaN, which no file should hold."""
    return None if math.isnan(value) else value


@dataclass
class Tally:
    """Counts, and the running mean and squared deviations (Chan, Golub and LeVeque 1983) of the log-likelihoods."""

    scored: int = 0
    mean: float = math.nan
    squares: float = 0.0
    skipped: int = 0
    first_skipped: str | None = None

    def add(self, values: np.ndarray, problems: list[str]) -> None:
        """Count the scores of a group, which are NaN for each of ``problems``."""
        self.skipped += len(problems)
        self.first_skipped = self.first_skipped or next(iter(problems), None)
        values = values[~np.isnan(values)]
        if len(values):
            before, mean = self.scored, float(values.mean())
            self.scored += len(values)
            share, change = len(values) / self.scored, mean - (self.mean if before else mean)
            self.mean = mean - change * (1 - share)
            self.squares += float(np.square(values - mean).sum()) + change**2 * before * share

    @property
    def stderr(self) -> float:
        return math.sqrt(self.squares / (self.scored - 1) / self.scored) if self.scored > 1 else math.nan


def table(report: dict) -> str:
    nats, stderr = report["log_likelihood"], report["log_likelihood_stderr"]
    rows = [("rows", f"{report['rows']:,}")]
    if report["skipped"]:
        rows.append(("skipped", f"{report['skipped']:,}, first: {report['first_skipped']}"))
    if nats is not None:
        rows.append(("nats, mean", f"{nats:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")))
    if report.get("bits_per_dim") is not None:
        rows.append(("bits/dim, mean", f"{report['bits_per_dim']:.4f}"))
    if "lower_bound" in report:
        rows.append(("lower bound", "values are missing"))
    rows += [("noise draws", str(report["draws"])), ("weights", report["weights"]), ("scores", report["output"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
