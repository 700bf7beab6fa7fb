"""``flowtrain score``: the log-likelihood of each row or image of a user's own."""

from __future__ import annotations

import csv
import json
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.bijections.ode import exact_trace, needs_exact_trace
from flowtrain.commands import ScoreConfig
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
from flowtrain.engine.evaluate import exact_arithmetic
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow, to_bits_per_dim
from flowtrain.runtime import distributed, files, global_batch
from flowtrain.runtime.seeds import seed_from

ARRAYS = "an array (npy, npz, h5, zarr)"
ROW_GROUP = 2**16  # rows that are written to a parquet file at once


def main(config: ScoreConfig, run_dir: str) -> dict:
    """Score ``config.input`` into ``config.output`` and print a summary, also written as score.json into ``run_dir``.

    Raises:
        UsageError: the input does not fit the model; nothing has been scored.
        FlowtrainError: an example cannot be read or has no finite likelihood, and ``config.on_bad`` is not skip.
    """
    output = _output_path(config, run_dir)
    restored = restore(config, config.ckpt, config.weights)
    flow = restored.flow.eval()
    source = _source(config, restored)
    label = _label(config, restored, source)
    figures = ["log_likelihood"]
    if restored.has_bits:
        figures.append("bits_per_dim")
    tally = Tally()
    groups = source.groups(distributed.rank(), distributed.world())
    with _open_output(output, [source.label, *figures]) if distributed.is_main() else nullcontext() as write:
        while True:
            group = next(groups, None)
            scores = None if group is None else _score_group(config, flow, source, group, label)
            turns = [turn for turn in distributed.all_gather_object(scores) if turn is not None]
            if not turns:
                break
            for names, log_probs, problems in turns if write else ():
                tally.add(log_probs, problems)
                write([[name, *_figures(value, len(figures), flow)] for name, value in zip(names, log_probs)])
    if not distributed.is_main():
        return {}
    report = {
        "rows": tally.scored + tally.skipped,
        "skipped": tally.skipped,
        **({"first_skipped": tally.first_skipped} if tally.skipped else {}),
        **{name: _number(mean) for name, mean in zip(figures, _figures(tally.mean, len(figures), flow))},
        "log_likelihood_stderr": _number(tally.stderr),
        "draws": config.draws,
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
        raise UsageError("input=PATH is needed: a table (csv, parquet, npy), or a folder, .zip, .tar or npy of images")
    path, data = input_path(config.input), restored.dataset
    grey_levels = data.spec.grey_levels
    suffix = "" if path.is_dir() else path.suffix.lower()
    if restored.columns is None and (arrays := open_arrays(path, data, config.on_bad)):
        return arrays
    if not data.spec.is_image:
        if suffix not in TABLES:
            raise UsageError(f"input={config.input}: this model takes rows: a file that ends in {', '.join(TABLES)}")
        return TableRows(
            path, restored.columns or unnamed_columns(restored.flow.dimensions, grey_levels), config.on_bad
        )
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
    shape, names = restored.flow.bijection.context_shape, class_names(restored.dataset.spec)
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


def _score_group(
    config: ScoreConfig, flow: Flow, source: Input, group: Group, label: Tensor | None
) -> tuple[list, list, list]:
    """(names, log-likelihoods, NaN where there is none, a line for each of those)."""
    context = group.context if label is None else label.expand(len(group.x), -1)
    try:
        values = log_likelihoods(flow, group.x, context, group.first, config.draws, config.batch, config.seed)
    except FloatingPointError as error:
        raise FlowtrainError(f"{config.input}: from {source.label} {group.names[0]} on: {error}") from error
    values[list(group.bad)] = math.nan
    problems = dict(group.bad)
    for place in (~values.isfinite()).nonzero().flatten().tolist():
        if place not in problems:
            name = group.names[place]
            name = f"row {name} (the first is 1)" if source.label == "row" else name
            problems[place] = f"{name}: its log-likelihood is {values[place]:g}"
            source.refuse(f"{config.input}: {problems[place]}")
            values[place] = math.nan
    return group.names, values.tolist(), [problems[place] for place in sorted(problems)]


@torch.no_grad()
def log_likelihoods(
    flow: Flow, x: Tensor, context: Tensor | None, first: int = 0, draws: int = 1, batch: int = 256, seed: int = 0
) -> Tensor:
    """Log-likelihoods of a group of examples in nats, float64 (B,) on the CPU, averaged over ``draws`` of the noise.

    The noise is that of :func:`flowtrain.engine.evaluate.evaluate`: a function of (seed, ``first``, draw) for the
    group, whatever ``batch`` is. ODEs of few dimensions have their exact trace.
    """
    device = next(flow.parameters()).device
    total = torch.zeros(len(x), dtype=torch.float64)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), exact_arithmetic():
        with exact_trace() if needs_exact_trace(flow) else nullcontext():
            for start in range(0, len(x), batch):
                part = slice(start, start + batch)
                given = x[part].to(device), None if context is None else context[part].to(device)
                for draw in range(draws):
                    torch.manual_seed(seed_from(seed, first, draw))
                    with global_batch.rows(start, len(x)):
                        total[part] += flow(*given).double().cpu() / draws
    return total


def _figures(log_prob: float, count: int, flow: Flow) -> list[float | None]:
    """The first ``count`` of log-likelihood and bits per dimension."""
    return [_number(log_prob), _number(to_bits_per_dim(log_prob, flow.dimensions))][:count]


def _number(value: float) -> float | None:
    """None for NaN, which no file should hold."""
    return None if math.isnan(value) else value


@dataclass
class Tally:
    """Counts, and the running mean and squared deviations (Welford) of the log-likelihoods."""

    scored: int = 0
    mean: float = math.nan
    squares: float = 0.0
    skipped: int = 0
    first_skipped: str | None = None

    def add(self, values: list[float], problems: list[str]) -> None:
        self.skipped += len(problems)
        self.first_skipped = self.first_skipped or next(iter(problems), None)
        for value in values:
            if not math.isnan(value):
                self.scored += 1
                mean = self.mean if self.scored > 1 else value
                self.mean = mean + (value - mean) / self.scored
                self.squares += (value - mean) * (value - self.mean)

    @property
    def stderr(self) -> float:
        return math.sqrt(self.squares / (self.scored - 1) / self.scored) if self.scored > 1 else math.nan


# ---- output ---------------------------------------------------------------------------------------------------------


def _output_path(config: ScoreConfig, run_dir: str) -> Path:
    path = Path(os.path.expanduser(config.output)) if config.output else Path(run_dir) / "scores.csv"
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError(f"output={config.output}: must end in .csv or .parquet")
    if not path.parent.is_dir():
        raise UsageError(f"output={config.output}: there is no folder {path.parent}")
    if config.input and path.exists() and path.samefile(input_path(config.input)):
        raise UsageError(f"output={config.output}: is the input itself")
    return path


@contextmanager
def _open_output(path: Path, heads: list[str]):
    """A function that writes rows. The file appears at ``path`` only when all have been written."""
    temporary = files.temporary(path)
    try:
        with (_parquet if path.suffix.lower() == ".parquet" else _csv)(temporary, heads) as write:
            yield write
        os.replace(temporary, path)
    except OSError as error:
        raise FlowtrainError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        files.discard(temporary)


@contextmanager
def _csv(path: Path, heads: list[str]):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        yield writer.writerows


@contextmanager
def _parquet(path: Path, heads: list[str]):
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UsageError("output: .parquet files need more packages: pip install 'flowtrain[tables]'") from error
    kinds = [pa.string() if heads[0] == "file" else pa.int64(), *[pa.float64()] * (len(heads) - 1)]
    schema = pa.schema(list(zip(heads, kinds)))
    waiting: list[list] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = list(zip(*waiting)) or [[] for _ in heads]
            writer.write_table(pa.table([pa.array(*pair) for pair in zip(columns, kinds)], schema=schema))
            waiting.clear()

        def write(rows: list[list]) -> None:
            waiting.extend(rows)
            if len(waiting) >= ROW_GROUP:
                flush()

        yield write
        if waiting:
            flush()


def table(report: dict) -> str:
    nats, stderr = report["log_likelihood"], report["log_likelihood_stderr"]
    rows = [("rows", f"{report['rows']:,}")]
    if report["skipped"]:
        rows.append(("skipped", f"{report['skipped']:,}, first: {report['first_skipped']}"))
    if nats is not None:
        rows.append(("nats, mean", f"{nats:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")))
    if report.get("bits_per_dim") is not None:
        rows.append(("bits/dim, mean", f"{report['bits_per_dim']:.4f}"))
    rows += [("noise draws", str(report["draws"])), ("weights", report["weights"]), ("scores", report["output"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
