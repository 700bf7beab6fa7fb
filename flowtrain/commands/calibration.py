"""The calibration rows of ``flowtrain score``: what its p-values and its typicality compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flowtrain.commands import ScoreConfig
from flowtrain.commands.outputs import progress
from flowtrain.commands.restored import Restored
from flowtrain.commands.scoring import Scorer, Scores, find_label, open_input
from flowtrain.data.inputs import SplitRows, input_path
from flowtrain.data.labels import list_classes
from flowtrain.data.spec import class_names
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime.seeds import seed_from
from flowtrain.scores.chain_rule import ChainRule
from flowtrain.scores.conformal import Conformal
from flowtrain.scores.typicality import entropy, typicality

DEFAULT = "test"
CAVEATS = {
    "test": "rows that training did not see",
    "val": "rows that chose the weights: p-values are a little too small",
}


def calibrate(config: ScoreConfig, restored: Restored, rule: ChainRule | None = None) -> Calibration:
    """Score the calibration rows, on every process.

    Their noise is drawn as often as that of new rows, but from another seed: each example's noise is its own. With
    ``rule`` their log-likelihoods are sums over columns, as new rows' are then: other roundings would part ties.

    Raises:
        UsageError: there are no such rows, or they are the input, count by weights, or were fitted.
    """
    given = config.calibration or DEFAULT
    if given == "train":
        raise UsageError("calibration=train: the flow was fitted to these rows; take test, val or a file of other rows")
    label = None
    if given in CAVEATS:
        split = restored.split(given)
        if split.weights is not None:
            raise UsageError(
                f"calibration={given}: the rows of this split count by dataset.weights, but p-values count rows alike;"
                " calibration=FILE takes a table whose rows are as frequent as new ones"
            )
        source = SplitRows(split, config.on_bad, config.trainer.workers)
    else:
        try:
            path = input_path(given, "calibration")
        except UsageError as error:
            raise UsageError(f"{error}; test and val are splits of the run's own data") from error
        if path.samefile(input_path(config.input)):
            raise UsageError(f"calibration={given}: is the input itself; take rows that are known to be usual")
        source = open_input(config, restored, given, "calibration")
        label = find_label(config, restored, source)
    scorer = Scorer(config, restored, source, f"calibration={given}", label, seed_from(config.seed, 1), rule)
    scores = []
    with progress(None, "calibration row") as bar:
        for group in scorer.scores():
            scores.append(group)
            bar.update(len(group.names))
    return Calibration(config, class_names(restored.dataset.spec), scores)


class Calibration:
    """Log-likelihoods of calibration rows. Those of a class-conditional model are compared within each class: there
    they are exchangeable whatever classes the input has (Vovk, Gammerman and Shafer 2005, section 4.5).

    Args:
        classes: the names of the classes, () for none.
        scores: of the calibration rows.
    """

    def __init__(self, config: ScoreConfig, classes: tuple[str, ...], scores: Sequence[Scores]):
        self.config, self.classes = config, classes
        self.given = config.calibration or DEFAULT
        found = [(one.log_prob, np.zeros(len(one.log_prob)) if one.classes is None else one.classes) for one in scores]
        log_prob, of_class = (np.concatenate(parts) for parts in zip(*found))
        usable = ~np.isnan(log_prob)
        if not usable.any():
            raise FlowtrainError(f"calibration={self.given}: no row has a likelihood")
        self.reference = {
            int(one): _Reference(torch.from_numpy(log_prob[usable & (of_class == one)]))
            for one in np.unique(of_class[usable])
        }
        self.compared, self.unusual, self.atypical = 0, 0.0, 0.0
        self.seen: set[int] = set()  # classes of new rows
        self.alarms = {"pvalue": 0, "pvalue_two_sided": 0}

    def compare(self, scores: Scores) -> dict[str, np.ndarray]:
        """The columns of p-values and typicality of new rows, NaN where these have no likelihood; count them for
        :meth:`report`."""
        columns: dict[str, np.ndarray] = {}
        of_class = np.zeros(len(scores.names), dtype=int) if scores.classes is None else scores.classes
        usable = ~np.isnan(scores.log_prob)
        for one in np.unique(of_class[usable]).tolist():
            if one not in self.reference:
                name = list_classes(self.classes[one : one + 1]) or one
                raise FlowtrainError(f"calibration={self.given}: has no row of the class {name}")
            self.seen.add(one)
            reference, rows = self.reference[one], usable & (of_class == one)
            log_prob = torch.from_numpy(scores.log_prob[rows])
            measured = {}
            if self.config.pvalue:
                measured["pvalue"] = reference.density.p_values(log_prob)
            if self.config.typicality:
                measured["typicality"] = typicality(log_prob, reference.entropy)
                measured["pvalue_two_sided"] = reference.density.two_sided(log_prob)
                self.atypical += reference.typical.unusual(-measured["typicality"]).sum().item()
            self.unusual += reference.density.unusual(log_prob).sum().item()
            self.compared += len(log_prob)
            for name in self.alarms.keys() & measured.keys():
                self.alarms[name] += int((measured[name] <= self.config.level).sum())
            for name, values in measured.items():
                columns.setdefault(name, np.full(len(rows), np.nan))[rows] = values.numpy()
        names = ["pvalue"] * self.config.pvalue + ["typicality", "pvalue_two_sided"] * self.config.typicality
        return {name: columns.get(name, np.full(len(usable), np.nan)) for name in names}

    def report(self) -> dict:
        """What the summary says of the rows compared so far."""
        used = [one for name, one in self.reference.items() if name in self.seen or not self.seen]
        smallest = min((one.density for one in used), key=len)
        report = {
            "calibration": self.given,
            "calibration_rows": sum(len(one.density) for one in used),
            **({"calibration_rows_of_a_class": len(smallest)} if len(used) > 1 else {}),
            "level": self.config.level,
        }
        if self.config.pvalue:
            report["alarms"] = self.alarms["pvalue"]
            report["false_alarm_rates"] = list(smallest.alarm_rates(self.config.level))
        if self.config.typicality:
            report["alarms_two_sided"] = self.alarms["pvalue_two_sided"]
            if len(used) == 1:
                report["entropy"] = used[0].entropy
        if self.compared:
            report["auroc_log_likelihood"] = self.unusual / self.compared
            if self.config.typicality:
                report["auroc_typicality"] = self.atypical / self.compared
        return report


class _Reference:
    """The log-likelihoods of the calibration rows of a class, (n,): as they are, and by their typicality."""

    def __init__(self, log_prob: torch.Tensor):
        self.density = Conformal(log_prob)
        self.entropy = entropy(log_prob)
        self.typical = Conformal(-typicality(log_prob, self.entropy))


def lines(report: dict) -> list[tuple[str, str]]:
    """The calibration's part of a report, for a table."""
    given, rows = report["calibration"], report["calibration_rows"]
    least = report.get("calibration_rows_of_a_class")
    of_class = f", at least {least:,} of a class," if least else ""
    what = f"the {given} split, {CAVEATS[given]}" if given in CAVEATS else given
    found = [("calibration", f"{rows:,} rows{of_class} of {what}")]
    level, scored = report["level"], report["rows"] - report["skipped"]
    for key, name in (("alarms", f"p ≤ {level:g}"), ("alarms_two_sided", f"two-sided p ≤ {level:g}")):
        if key in report:
            share = f" ({100 * report[key] / scored:.3g} %)" if scored else ""
            found.append((name, f"{report[key]:,} of {scored:,} rows{share}"))
    if "false_alarm_rates" in report:
        low, high = report["false_alarm_rates"]
        says = f"{100 * low:.3g} to {100 * high:.3g} % of usual rows, for 95 in 100 calibration samples of this size"
        if not high:
            says = f"none: p ≤ {level:g} takes at least {-int(-1 // level) - 1:,} calibration rows"
        found.append(("false alarms", says))
    if "entropy" in report:
        found.append(("entropy", f"{report['entropy']:.4f} nats"))
    if "auroc_log_likelihood" in report:
        parts = [f"log p {report['auroc_log_likelihood']:.4f}"]
        if "auroc_typicality" in report:
            parts.append(f"typicality {report['auroc_typicality']:.4f}")
        found.append(("AUROC", f"{', '.join(parts)}: the input told from the calibration rows"))
    return found
