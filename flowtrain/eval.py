"""``flowtrain eval``: bits per dimension of a checkpoint on a split."""

from __future__ import annotations

import json
import math
from pathlib import Path

from flowtrain import distributed
from flowtrain.assemble import build_flow, judge, load_weights
from flowtrain.config import build
from flowtrain.engine import checkpoint
from flowtrain.engine.evaluate import Evaluation


def main(cfg, run_dir: str) -> dict:
    """Evaluate ``cfg.ckpt``, print a table (or JSON), write eval.json into ``run_dir``; returns what it holds."""
    flow = build_flow(cfg, distributed.device())
    weights = load_weights(flow, checkpoint.read(cfg.ckpt), cfg.weights)
    split = build(cfg.dataset, allow=cfg.allow, on_bad=cfg.on_bad).split(cfg.split)
    result = judge(flow, split, cfg, cfg.examples, cfg.draws)
    report = {
        "bits_per_dim": result.bits_per_dim,
        "bits_per_dim_stderr": result.bits_per_dim_stderr,
        **({"bits_per_dim_iw": result.bits_per_dim_iw} if result.bits_per_dim_iw is not None else {}),
        "log_likelihood": result.log_likelihood,
        "log_likelihood_stderr": result.log_likelihood_stderr,
        "examples": result.examples,
        "draws": result.draws,
        "split": cfg.split,
        "data": split.description,
        "weights": weights,
        "checkpoint": str(cfg.ckpt),
    }
    if cfg.get("published"):
        report["published"] = compare(
            cfg.published, result, flow.dimensions, cfg.split, cfg.dataset.levels, split.description
        )
    if distributed.is_main():
        (Path(run_dir) / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2) if cfg.json else table(report))
    return report


def compare(published, result: Evaluation, dimensions: int, split: str, levels: int, description: str) -> dict:
    """The published figure with ours in its unit and space, or why they cannot be compared."""
    ours, why = None, None
    if published.split != split:
        why = f"it is of the {published.split} split"
    elif published.data not in description:
        why = f"it is of other data ({published.data})"
    elif published.levels != levels:
        why = f"it is of {published.levels} levels, not {levels}"
    elif published.unit == "bits_per_dim" and published.space == "integers":
        ours = result.bits_per_dim
    elif published.unit == "nats" and published.space == "integers":
        ours = result.log_likelihood
    elif published.unit == "nats" and published.space == "unit":  # the density of (x + u)/levels on [0, 1]
        ours = result.log_likelihood + dimensions * math.log(levels)
    else:
        why = f"it is in {published.unit} in {published.space} space"
    return {**published, "ours": ours, "not_comparable": why}


def table(report: dict) -> str:
    rows = [("bits/dim", f"{report['bits_per_dim']:.4f} ± {report['bits_per_dim_stderr']:.4f}")]
    if "bits_per_dim_iw" in report:
        rows.append(("bits/dim, importance-weighted", f"{report['bits_per_dim_iw']:.4f}"))
    rows += [
        ("nats per example", f"{report['log_likelihood']:.3f} ± {report['log_likelihood_stderr']:.3f}"),
        ("examples", f"{report['examples']} ({report['split']})"),
        ("noise draws", str(report["draws"])),
        ("weights", report["weights"]),
        ("checkpoint", report["checkpoint"]),
    ]
    if published := report.get("published"):
        value = f"{published['value']:g} {published['unit'].replace('bits_per_dim', 'bits/dim')}"
        ours = published["ours"]
        ours = f"not comparable: {published['not_comparable']}" if ours is None else f"ours: {ours:.4f}"
        rows.append(("published", f"{value} ({published['source']}); {ours}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
