"""``flowtrain eval`` of a run that learned from a target."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.bijections import Autoregressive
from flowtrain.bijections.ode import traced_layers
from flowtrain.commands import EvalConfig
from flowtrain.commands.draws import draw_samples
from flowtrain.commands.evaluation import evaluate_split
from flowtrain.commands.outputs import open_array
from flowtrain.commands.restored import Restored
from flowtrain.engine import importance
from flowtrain.engine.evaluate import plus_minus
from flowtrain.engine.importance import Figure
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint, distributed, environment, files

FEW = 10_000  # samples of a flow that takes long for each
FOUND = 0.1  # of the samples that a mode should have: with so many it is found
HEAVY = 0.7  # a Pareto shape above which sums of weights are not reliable (Vehtari et al. 2024)
UNRELIABLE = f", above {HEAVY}: a few samples decide log Z and ESS, and their errors are too small; train longer"


def evaluate_target(config: EvalConfig, run_dir: str, restored: Restored) -> dict:
    """Evaluate a flow by the importance weights of its samples, and of exact ones of the target where there are any.

    Writes eval.json, log_weights.npy with log w = log p(x) − log q(x) of each sample of the flow, and environment.json
    into ``run_dir``. Returns the content of eval.json. Samples where the target's density is 0 have weight 0 and are
    counted; the evidence lower bound then is −∞, null in the file.
    """
    flow, split = restored.flow, restored.split(config.split)
    target = restored.dataset.spec.target
    examples = config.examples
    if examples == "auto":
        examples = min(FEW, len(split)) if _is_slow(flow) else None
    with out_of_memory(distributed.device(), "the importance weights"):
        result = evaluate_split(flow, split, config, examples, exact=True, zeros=True)
        log_w = result.each[~result.each.isnan()]
        if not log_w.isfinite().any():
            raise FlowtrainError(f"target {target.name}: its density is 0 at all {len(log_w):,} samples of the flow")
        reference = split.reference(len(log_w))
        of_reference = reference and evaluate_split(flow, reference, config, exact=True).each
    report = {
        "target": target.name,
        "elbo": result.log_likelihood if math.isfinite(result.log_likelihood) else None,
        "elbo_stderr": result.log_likelihood_stderr,
        **_figure("log_z", importance.log_z(log_w)),
        "log_z_exact": target.log_z,
        **_figure("ess", importance.effective_share(log_w)),
        **(_figure("forward_ess", importance.forward_effective_share(of_reference)) if reference else {}),
        "pareto_shape": importance.pareto_shape(log_w) if len(log_w) >= importance.FEWEST else None,
        "acceptance": importance.acceptance(log_w),
        **(_modes(restored, target, len(log_w), config.seed) if target.modes else {}),
        "examples": len(log_w),
        "zero_weights": int((log_w == -torch.inf).sum()),
        "split": config.split,
        "data": split.description,
        "dimensions": flow.dimensions,
        "seed": config.seed,
        "weights": restored.weights,
        "checkpoint": config.ckpt,
        "checkpoint_sha256": checkpoint.digest(config.ckpt),
    }
    if distributed.is_main():
        files.write_json(Path(run_dir) / "eval.json", report)
        with open_array(Path(run_dir) / "log_weights.npy", len(log_w)) as write:
            write(log_w.numpy())
        environment.record(run_dir, distributed.device(), precision="float32")
    return report


def target_table(report: dict) -> str:
    """The report as lines for the terminal."""
    exact = report["log_z_exact"]
    of_exact = "" if exact is None else f"; exact: {exact:.4f}"
    rows = [
        ("target", f"{report['target']}, {report['dimensions']} dimensions"),
        ("ELBO, nats", "−∞" if report["elbo"] is None else plus_minus(report["elbo"], report["elbo_stderr"])),
        ("log Z, nats", plus_minus(report["log_z"], report["log_z_stderr"]) + of_exact),
    ]
    if exact is not None and report["elbo"] is not None:
        rows.append(("reverse KL, nats", plus_minus(exact - report["elbo"], report["elbo_stderr"])))
    rows.append(("ESS, of the flow's samples", _percent(report["ess"], report["ess_stderr"])))
    if "forward_ess" in report:
        rows.append(("ESS, of exact samples", _percent(report["forward_ess"], report["forward_ess_stderr"])))
    if (shape := report["pareto_shape"]) is not None:
        rows.append(("Pareto k of weights", f"{shape:.2f}{'' if shape <= HEAVY else UNRELIABLE}"))
    rows.append(("Metropolis acceptance", f"{100 * report['acceptance']:.1f} %"))
    if "modes" in report:
        as_many = report["modes_of_exact_samples"]
        rows.append(
            ("modes found", f"{report['modes_found']:,} of {report['modes']:,} (exact samples, as many: {as_many:,})")
        )
    zeros = report["zero_weights"]
    rows += [
        ("samples", f"{report['examples']:,}" + (f", {zeros:,} where the target's density is 0" if zeros else "")),
        ("weights", report["weights"]),
        ("checkpoint", report["checkpoint"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _is_slow(flow) -> bool:
    return any(isinstance(layer, Autoregressive) for layer in flow.modules()) or bool(traced_layers(flow))


def _modes(restored: Restored, target, n: int, seed: int) -> dict:
    samples = draw_samples(restored.flow, n, seed)
    exact = target.sample(n, torch.Generator().manual_seed(seed))
    return {
        "modes": target.modes,
        "modes_found": count_modes(target, samples),
        "modes_of_exact_samples": count_modes(target, exact),
    }


def count_modes(target, samples: Tensor) -> int:
    """The number of modes that a tenth as many of the samples are at as would be of exact ones, and at least one."""
    which = target.mode_of(samples)
    counts = torch.bincount(which[which >= 0], minlength=target.modes)
    due = FOUND * len(samples) * target.mode_weights().to(counts.device)
    return int(((counts > 0) & (counts >= due)).sum())


def _figure(name: str, figure: Figure) -> dict:
    return {name: figure.value, f"{name}_stderr": figure.stderr}


def _percent(value: float, stderr: float) -> str:
    return f"{plus_minus(100 * value, 100 * stderr, 1)} %"
