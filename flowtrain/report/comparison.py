"""Runs side by side: their figures on the same examples, and paired differences, which decide between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowtrain.report.run import Curve

NOISE = 2  # standard errors that a difference must exceed


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a split.

    Attributes:
        report: the content of eval.json.
        each: the log-likelihood of each example in nats, (N,); NaN for those that were not evaluated.
        weights: of the examples, (N,); None: all alike.
    """

    report: Mapping
    each: np.ndarray
    weights: np.ndarray | None = None

    @property
    def data(self) -> str:
        """What the same likelihoods of are comparable: equal for the same examples in the same units."""
        return self.report["data_sha256"]

    @property
    def has_bits(self) -> bool:
        return "bits_per_dim" in self.report


@dataclass
class ComparedRun:
    """What is known of a run.

    Attributes:
        name: short, and different from that of every other run.
        path: its directory, or the checkpoint's file.
        checkpoint: the file that is evaluated; None: it has none.
        keys: its configuration, by dotted keys.
        overrides: the words of its command line, key -> value.
        summary: the content of summary.json, {} where there is none.
        state: "finished", "running", "interrupted", "failed", or "" where that is unknown.
        curves: of metrics.jsonl, by name.
        evaluation: of the split that is compared.
        picture: its last image of samples, (H, W, 3) uint8.
        missing: a line for each thing that it lacks.
    """

    name: str
    path: Path
    checkpoint: Path | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping = field(default_factory=dict)
    state: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    picture: np.ndarray | None = None
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """A run minus its reference, on the same examples.

    Attributes:
        mean, stderr: of ``each``; no standard error (None) of one example.
        each: by example, in ``unit``.
        lower_is_better: whether a negative difference is better.
    """

    mean: float
    stderr: float | None
    each: np.ndarray
    unit: str
    lower_is_better: bool

    @property
    def words(self) -> str:
        """The reading of the difference.

        >>> Difference(0.012, 0.003, np.zeros(9), "bits/dim", True).words
        'worse by 0.0120 ± 0.0030 bits/dim'
        >>> Difference(0.002, 0.003, np.zeros(9), "bits/dim", True).words
        'no difference beyond noise: 0.0020 ± 0.0030 bits/dim'
        """
        if not self.each.any():
            return "the same on every example"
        if self.stderr is None:
            return f"{self.mean:+.4g} {self.unit} on one example"
        digits = significant_digits(self.stderr)
        text = f"{abs(self.mean):.{digits}f} ± {self.stderr:.{digits}f} {self.unit}"
        if abs(self.mean) < NOISE * self.stderr:
            return f"no difference beyond noise: {'−' * (self.mean < 0)}{text}"
        return f"{'better' if (self.mean < 0) == self.lower_is_better else 'worse'} by {text}"


@dataclass(frozen=True)
class Row:
    """A run in a comparison.

    Attributes:
        figure, stderr: on the examples that all runs of its group have, in the group's unit; None without evaluation.
        reference: the name of the run that it is compared with; None of a run that is compared with none.
        difference: from that run; None of the reference itself.
    """

    run: ComparedRun
    figure: float | None = None
    stderr: float | None = None
    reference: str | None = None
    difference: Difference | None = None

    @property
    def is_reference(self) -> bool:
        return self.reference == self.run.name


@dataclass(frozen=True)
class Group:
    """Runs that are evaluated on the same examples, the best first.

    Attributes:
        unit: "bits/dim" or "nats".
        examples: that all of them have.
        description: of the data.
    """

    rows: list[Row]
    unit: str
    examples: int
    description: str


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    groups: of runs on the same data, the largest first.
    others: runs without an evaluation.
    keys: those that differ between the runs' configurations.
    notes: a line for each thing that a reader should know.
    """

    groups: list[Group]
    others: list[Row]
    keys: list[str]
    notes: list[str]

    @property
    def rows(self) -> list[Row]:
        return [*(row for group in self.groups for row in group.rows), *self.others]

    def group_of(self, row: Row) -> Group | None:
        return next((group for group in self.groups if row in group.rows), None)


def compare(runs: Sequence[ComparedRun], keys: Sequence[str], first_is_reference: bool = False) -> Comparison:
    """Group runs by their data and compare each run with the best of its group, or with the first that was named."""
    by_data: dict[tuple, list[ComparedRun]] = {}
    for run in runs:
        if (one := run.evaluation) is not None:
            by_data.setdefault((one.data, one.has_bits, len(one.each)), []).append(run)
    together = sorted(by_data.values(), key=len, reverse=True)
    groups = [_group(members, first_is_reference) for members in together]
    notes = [_why_apart(together[0][0], members[0], members) for members in together[1:]]
    others = [Row(run) for run in runs if run.evaluation is None]
    return Comparison(groups, others, list(keys), notes)


def _group(runs: Sequence[ComparedRun], first_is_reference: bool) -> Group:
    one = runs[0].evaluation
    has_bits, dimensions = one.has_bits, one.report["dimensions"]
    to_unit = -1 / (dimensions * math.log(2)) if has_bits else 1.0
    common = np.all([np.isfinite(run.evaluation.each) for run in runs], 0)
    weights = np.ones(len(common)) if one.weights is None else one.weights.astype(np.float64)
    common &= weights > 0
    values = {run.name: run.evaluation.each[common] * to_unit for run in runs}
    weights = weights[common]
    figures = {name: mean_and_stderr(each, weights) for name, each in values.items()}
    order = sorted(runs, key=lambda run: figures[run.name][0] * (1 if has_bits else -1))
    reference = (runs if first_is_reference else order)[0].name
    unit, rows = "bits/dim" if has_bits else "nats", []
    for run in order:
        difference = None
        if len(runs) > 1 and run.name != reference:
            each = values[run.name] - values[reference]
            difference = Difference(*mean_and_stderr(each, weights), each, unit, has_bits)
        rows.append(Row(run, *figures[run.name], reference if len(runs) > 1 else None, difference))
    return Group(rows, unit, int(common.sum()), one.report.get("data", ""))


def mean_and_stderr(values: np.ndarray, weights: np.ndarray) -> tuple[float, float | None]:
    """m = Σ wᵢxᵢ / Σ wᵢ and √(n/(n − 1) Σ wᵢ²(xᵢ − m)²) / Σ wᵢ (Cochran 1977, chapter 6), as ``eval`` reports them;
    with equal weights, the standard deviation over √n. None of one example.

    >>> mean_and_stderr(np.array([1.0, 3.0]), np.ones(2))
    (2.0, 1.0)
    """
    if not len(values):
        return math.nan, None
    total, n = weights.sum(), len(values)
    mean = float((weights * values).sum() / total)
    if n == 1:
        return mean, None
    return mean, float(math.sqrt(np.square(weights * (values - mean)).sum() * n / (n - 1)) / total)


def significant_digits(stderr: float) -> int:
    """Decimal places that show two digits of a standard error, at least 2.

    >>> significant_digits(0.0031), significant_digits(12.0)
    (4, 2)
    """
    return 4 if not stderr > 0 else min(10, max(2, 1 - math.floor(math.log10(stderr))))


def _why_apart(main: ComparedRun, other: ComparedRun, members: Sequence[ComparedRun]) -> str:
    """Why the runs of another group have no paired differences with those of the first."""
    names = ", ".join(run.name for run in members[:4]) + (", …" if len(members) > 4 else "")
    ours, theirs = main.evaluation, other.evaluation
    keys = dict.fromkeys(key for key in [*main.keys, *other.keys] if key == "dataset" or key.startswith("dataset."))
    apart = [key for key in keys if main.keys.get(key) != other.keys.get(key)]
    apart = ["dataset"] if "dataset" in apart else apart
    if apart:
        what = ", ".join(f"{key}={other.keys.get(key, '–')}, not {main.keys.get(key, '–')}" for key in apart[:3])
    elif len(ours.each) != len(theirs.each):
        what = f"{len(theirs.each):,} examples, not {len(ours.each):,}"
    elif ours.has_bits != theirs.has_bits:
        what = "another unit"
    else:
        what = "the examples differ"
    return f"{names}: other data than {main.name} ({what}), so no paired difference with it"
