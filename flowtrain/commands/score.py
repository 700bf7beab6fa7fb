"""``flowtrain score``: the log-likelihood of each row or image of a user's own, and how unusual it is."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowtrain.bijections.ode import exact_trace, needs_exact_trace
from flowtrain.commands import ScoreConfig, calibration
from flowtrain.commands.outputs import open_table, progress, table_path
from flowtrain.commands.restored import Restored, restore
from flowtrain.commands.scoring import Scorer, Scores, find_label, open_input
from flowtrain.data.inputs import TABLES, input_path
from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.errors import UsageError
from flowtrain.flow import Flow, to_bits_per_dim
from flowtrain.runtime import distributed, files
from flowtrain.scores.chain_rule import ChainRule


@torch.no_grad()
def main(config: ScoreConfig, run_dir: str) -> dict:
    """Score ``config.input`` into ``config.output`` and print a summary, also written as score.json into ``run_dir``.

    Raises:
        UsageError: the input does not fit the model, or the model has not what a key asks for; nothing has been scored.
        FlowtrainError: an example cannot be read or has no finite likelihood, and ``config.on_bad`` is not skip.
    """
    output = table_path(config.output, Path(run_dir) / "scores.csv")
    if not config.input:
        raise UsageError(f"input=PATH is needed: {TABLES}, or a folder, .zip, .tar or array of images")
    if output.exists() and output.samefile(input_path(config.input)):
        raise UsageError(f"output={config.output}: is the input itself")
    compares = config.pvalue or config.typicality
    if config.calibration is not None and not compares:
        raise UsageError(f"calibration={config.calibration}: is for pvalue=true or typicality=true")
    restored = restore(config, config.ckpt, config.weights)
    flow = restored.flow.eval()
    source = open_input(config, restored, config.input)
    label = find_label(config, restored, source)
    rule = _chain_rule(restored) if config.by_column else None
    if config.outside:
        _check_ranges(restored)
    scorer = Scorer(config, restored, source, config.input, label, config.seed, rule, config.outside)
    tally, outside = Tally(), Outside()
    with (
        evaluation_mode(next(flow.parameters()).device),
        exact_trace() if needs_exact_trace(flow) else nullcontext(),
    ):
        usual = calibration.calibrate(config, restored, rule) if compares else None
        with (
            open_table(output) if distributed.is_main() else nullcontext() as write,
            progress(None, source.label) as bar,
        ):
            for scores in scorer.scores():
                if not write:
                    continue
                tally.add(scores.log_prob, scores.problems)
                columns = {source.label: scores.names, **_figures(scores.log_prob, flow, restored.has_bits)}
                columns |= usual.compare(scores) if usual else {}
                columns |= outside.add(scores) if config.outside else {}
                columns |= _by_column(scores, restored) if rule else {}
                write(columns)
                bar.update(len(scores.names))
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
        **(usual.report() if usual else {}),
        **({"rows_outside": outside.rows, "outside": dict(outside.columns)} if config.outside else {}),
        **({"order_of_columns": _order(rule, restored)} if rule else {}),
        "input": config.input,
        "output": str(output),
        "weights": restored.weights,
        "checkpoint": config.ckpt,
    }
    files.write_json(Path(run_dir) / "score.json", report)
    print(json.dumps(report, indent=2) if config.json else table(report), flush=True)
    return report


def _chain_rule(restored: Restored) -> ChainRule:
    """Raises UsageError where the flow has none."""
    if restored.dataset.spec.is_image:
        raise UsageError("by_column=true: is for the columns of a table; this model takes images")
    try:
        return ChainRule(restored.flow)
    except ValueError as error:
        raise UsageError(
            f"by_column=true: log p of this flow does not split over columns: {error}; model=made and made_mog have one"
            " order of columns, and so have maf, iaf, maf_mog and nsf_autoregressive with mixing=none"
        ) from error


def _check_ranges(restored: Restored) -> None:
    """Raise UsageError where the checkpoint holds no ranges of columns."""
    if restored.columns is None:
        raise UsageError("outside=true: is for the columns of a table, which this model does not have")
    if not restored.columns.has_ranges:
        raise UsageError(
            "outside=true: this checkpoint, of an earlier version, holds no ranges of its columns; train again"
        )


def _names(restored: Restored) -> list[str]:
    """The name of the column of each of a row's D numbers."""
    columns = restored.columns.encoded if restored.columns else ()
    return [column.name for column in columns] or [f"x{i}" for i in range(restored.flow.dimensions)]


def _order(rule: ChainRule, restored: Restored) -> list[str]:
    """The names of the columns in the order of the flow; an indicator of missing values is a column too."""
    names = _names(restored)
    return [f"{names[i]} missing" if names[i] in names[:i] else names[i] for i in rule.order]


def _by_column(scores: Scores, restored: Restored) -> dict[str, np.ndarray]:
    """The share of each column in the log-likelihood; an indicator of missing values counts to its column."""
    shares: dict[str, np.ndarray] = {}
    for name, term in zip(_names(restored), scores.terms.T):
        heading = f"log_likelihood.{name}"
        shares[heading] = shares[heading] + term if heading in shares else term
    return shares


class Outside:
    """Counts rows outside the range of the train split, and by column.

    Attributes:
        rows, columns: so many so far.
    """

    def __init__(self):
        self.rows, self.columns = 0, Counter()

    def add(self, scores: Scores) -> dict[str, np.ndarray]:
        """Count rows, and return their column: the names of the columns in which each is outside; None: none."""
        names, found = [*scores.outside], np.array([*scores.outside.values()], dtype=bool)
        texts = np.full(len(scores.names), None, dtype=object)
        for row in np.flatnonzero(found.any(0)) if names else ():
            texts[row] = ", ".join(name for name, is_outside in zip(names, found[:, row]) if is_outside)
            self.rows += 1
        self.columns.update({name: int(each.sum()) for name, each in scores.outside.items() if each.any()})
        return {"outside": texts}


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
    if "calibration" in report:
        rows += calibration.lines(report)
    if "outside" in report:
        columns = ", ".join(f"{name} {count:,}" for name, count in report["outside"].items())
        rows.append(("outside", f"{report['rows_outside']:,} rows" + (f": {columns}" if columns else "")))
    if "order_of_columns" in report:
        rows.append(("columns", f"each given those before it: {', '.join(report['order_of_columns'])}"))
    rows += [("noise draws", str(report["draws"])), ("weights", report["weights"]), ("scores", report["output"])]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
