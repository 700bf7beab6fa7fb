"""``flowtrain check calibration=true``: are the posteriors of a run as wide as they should be?"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands import CheckConfig
from flowtrain.commands.draws import sample_batches
from flowtrain.commands.outputs import progress
from flowtrain.commands.restored import Restored, restore
from flowtrain.data.inputs import TableRows, input_path
from flowtrain.engine.calibration import LEVELS, Uniformity, band, c2st, curve, places, uniformity
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.plots.calibration import BINS, plot_calibration
from flowtrain.runtime import files

log = logging.getLogger("flowtrain")

LEAST_P = 0.001  # of all tests together, if the posteriors are calibrated
QUOTED = (0.5, 0.68, 0.9, 0.95)  # levels whose coverage is printed
NAMES = {"coverage": "coverage of highest-density regions", "tarp": "TARP"}


def calibrate(config: CheckConfig, run_dir: str) -> dict:
    """Draw from the posterior of each row of the test split, find where the row's true parameters lie among the draws,
    and test whether they lie evenly; print a table (or JSON), write check.json and calibration.png.

    Raises:
        UsageError: the run models images, or columns that are not real numbers.
        FlowtrainError: a test fails.
    """
    start = time.monotonic()
    restored = restore(config, config.ckpt, config.weights)
    names = _names(restored)
    reference = _reference(config, restored)  # any mistake comes before the work
    split = restored.split("test")
    count = min(config.simulations, len(split))
    if count < 2:
        raise UsageError(f"calibration=true: needs 2 rows of the test split, which has {len(split)}")
    truth, context = split.take(torch.arange(count) * len(split) // count)
    with progress(count, "posterior") as bar:
        batches = _draws(restored.flow, count, config, context, bar)
        found = places(restored.flow, truth.cpu(), batches, context, config.seed)
    tests = {name: uniformity(found.ranks[:, i]) for i, name in enumerate(names)}
    tests |= {NAMES["coverage"]: uniformity(found.credibility), NAMES["tarp"]: uniformity(found.distance)}
    limit = LEAST_P / len(tests) / config.tolerance
    curves = {name: curve(shares) for name, shares in zip(NAMES, (found.credibility, found.distance))}
    low, high = band(count)
    failed = [name for name, test in tests.items() if test.p_value < limit]
    report = {
        "passed": not failed,
        "posteriors": count,
        "draws": config.draws,
        "least_p_value": limit,
        "parameters": [
            {
                "name": name,
                "p_value": tests[name].p_value,
                "distance": tests[name].distance,
                "histogram": np.histogram(found.ranks[:, i].numpy(), BINS, (0, 1))[0].tolist(),
            }
            for i, name in enumerate(names)
        ],
        **{
            key: {
                "p_value": tests[NAMES[key]].p_value,
                "distance": tests[NAMES[key]].distance,
                "found": curves[key].tolist(),
            }
            for key in NAMES
        },
        "levels": LEVELS.round(2).tolist(),
        "band": {"low": low.tolist(), "high": high.tolist()},
        "c2st": _c2st(restored, reference, config.seed),
        "weights": restored.weights,
        "checkpoint": config.ckpt,
        "seed": config.seed,
        "seconds": round(time.monotonic() - start, 1),
    }
    files.write_json(Path(run_dir) / "check.json", report)
    plot = Path(run_dir) / "calibration.png"
    try:
        ranks = {name: found.ranks[:, i].numpy() for i, name in enumerate(names)}
        (few, many), title = band(count, np.array([1 / BINS])), f"{count} posteriors, {config.draws} draws of each"
        labels = {NAMES[key]: values for key, values in curves.items()}
        plot_calibration(plot, ranks, labels, LEVELS, (low, high), (few[0], many[0]), title)
    except UsageError as error:
        log.info("without a plot: %s", error)
        plot = None
    print(json.dumps(report, indent=2) if config.json else _table(report, tests, limit, plot), flush=True)
    if failed:
        worst = min(failed, key=lambda name: tests[name].p_value)
        line = f"{len(failed)} of {len(tests)} tests failed, first: {worst}, p = {tests[worst].p_value:.2g}"
        raise FlowtrainError(f"not calibrated: {line}")
    return report


def _names(restored: Restored) -> list[str]:
    """The names of the parameters. Raises UsageError where ranks make no sense."""
    spec = restored.dataset.spec
    if spec.is_image or spec.grey_levels:
        raise UsageError(f"calibration=true: ranks are those of real numbers, and {spec.name} has images")
    for column in spec.columns or ():
        if column.kind != "real" or column.missing:
            raise UsageError(f"calibration=true: column '{column.name}' is not one of real numbers without gaps")
    return [column.name for column in spec.columns] if spec.columns else [f"x{i}" for i in range(spec.shape[0])]


def _draws(flow: Flow, count: int, config: CheckConfig, context: Tensor | None, bar) -> Iterator[Tensor]:
    """Yield ``config.draws`` draws for each of some rows, (n, draws, D), in order: whole batches as memory allows."""
    each = config.draws

    def of(samples: slice) -> Tensor:
        return context[torch.arange(samples.start, samples.stop) // each]

    waiting = torch.empty(0, *flow.shape)
    for _, samples in sample_batches(flow, count * each, config.seed, None if context is None else of):
        waiting = torch.cat([waiting, samples])
        whole = len(waiting) // each
        if whole:
            yield waiting[: whole * each].unflatten(0, (whole, each))
            waiting = waiting[whole * each :]
            bar.update(whole)


def _reference(config: CheckConfig, restored: Restored) -> list[tuple[Tensor, Tensor | None]]:
    """The samples of reference posteriors, (n, D), and the observation of each as the flow takes it, (1, C)."""
    if config.reference is None:
        return []
    if not restored.columns:
        raise UsageError(f"reference={config.reference}: only a run with named columns has a reference")
    rows = TableRows(input_path(config.reference, "reference"), restored.columns, data=restored.dataset)
    groups = list(rows.groups())
    x = torch.cat([group.x for group in groups])
    if groups[0].context is None:
        return [(x, None)]
    given, which = torch.unique(torch.cat([group.context for group in groups]), dim=0, return_inverse=True)
    return [(x[which == i], given[i : i + 1]) for i in which.unique(sorted=False).tolist()]


def _c2st(restored: Restored, reference: list[tuple[Tensor, Tensor | None]], seed: int) -> list[dict]:
    """The C2ST of as many draws as each reference posterior has samples."""
    found = []
    for truth, given in reference:
        if len(truth) < 10:
            raise UsageError(f"reference: an observation has {len(truth)} samples; C2ST needs 10")
        of = None if given is None else lambda samples: given.expand(samples.stop - samples.start, *given.shape[1:])
        draws = torch.cat([samples for _, samples in sample_batches(restored.flow, len(truth), seed, of)])
        found.append({"samples": len(truth), "c2st": c2st(truth.double().numpy(), draws.double().numpy())})
    return found


def _table(report: dict, tests: dict[str, Uniformity], limit: float, plot: Path | None) -> str:
    rows = [("uniform?", "p-value", "distance", "")]
    rows += [
        (name, f"{test.p_value:.3g}", f"{test.distance:.3f}", "pass" if test.p_value >= limit else "FAIL")
        for name, test in tests.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    at = [int(np.argmin(np.abs(LEVELS - level))) for level in QUOTED]
    shares = ", ".join(f"{LEVELS[i]:.0%} regions {report['coverage']['found'][i]:.1%}" for i in at)
    low, high = report["band"]["low"][at[2]], report["band"]["high"][at[2]]
    lines.append(f"coverage: {shares} (a calibrated 90 % region has {low:.1%} to {high:.1%} of {report['posteriors']})")
    for i, one in enumerate(report["c2st"], 1):
        lines.append(f"C2ST {i}: {one['c2st']:.3f} on {one['samples']:,} samples of the reference; 0.5 is perfect")
    verdict = "passed" if report["passed"] else "FAILED"
    lines.append(f"{verdict}: {report['posteriors']} posteriors, {report['draws']} draws each, {report['seconds']} s")
    return "\n".join([*lines, *([str(plot)] if plot else [])])
