"""``flowtrain eval``: bits per dimension, or nats per row, of a checkpoint on a split."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from flowtrain.bijections import Bijection, Logit, VariationalDequantize
from flowtrain.bijections.ode import continuous_layers, needs_exact_trace, traced_layers
from flowtrain.commands import EvalConfig
from flowtrain.commands.eval_target import evaluate_target, target_table
from flowtrain.commands.evaluation import data_digest, evaluate_split, split_batches
from flowtrain.commands.outputs import open_array
from flowtrain.commands.restored import restore
from flowtrain.commands.solver_error import Errors, evaluate_to_its_error
from flowtrain.config.schema import PublishedConfig
from flowtrain.data import Split
from flowtrain.data.spec import LabelContext
from flowtrain.engine.evaluate import Evaluation, plus_minus, without_label
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, environment, files, global_batch

EXAMPLES = 1000  # with an exact trace, which costs D times a stochastic one


def main(config: EvalConfig, run_dir: str) -> dict:
    """Evaluate ``config.ckpt`` and print a table, or JSON; see :func:`evaluate`."""
    report = evaluate(config, run_dir)
    if distributed.is_main():
        in_lines = target_table if "target" in report else table
        print(json.dumps(report, indent=2) if config.json else in_lines(report))
    return report


def evaluate(config: EvalConfig, run_dir: str) -> dict:
    """Evaluate ``config.ckpt`` and write eval.json, log_likelihoods.npy and environment.json into ``run_dir``.

    log_likelihoods.npy holds one number in nats for each example of the split, NaN for those that were not evaluated:
    what decides between two models is the mean of the differences on the same examples. If these are weighted,
    example_weights.npy holds their weights.

    A run that learned from a target has other figures: :func:`flowtrain.commands.eval_target.evaluate_target`.

    Returns the content of eval.json.
    """
    restored = restore(config, config.ckpt, config.weights)
    if restored.dataset.spec.target is not None:
        return evaluate_target(config, run_dir, restored)
    flow, label = restored.flow, restored.dataset.spec.context
    is_labelled = isinstance(label, LabelContext)
    if config.unlabelled and not is_labelled:
        raise UsageError("unlabelled=true: this model is not class-conditional; leave unlabelled=false")
    split = restored.split(config.split)
    has_ode, is_traced = bool(continuous_layers(flow)), bool(traced_layers(flow))
    exact = needs_exact_trace(flow)
    examples = config.examples
    if examples == "auto":
        examples = EXAMPLES if exact and has_ode else None
    probes = config.probes if is_traced and not exact else 1
    evaluate = partial(evaluate_split, flow, split, config, examples, config.draws, exact, probes=probes)
    with out_of_memory(distributed.device(), f"the likelihoods of the {config.split} split"):
        if has_ode:
            result, errors = evaluate_to_its_error(evaluate, config.tolerance, flow.dimensions)
        else:
            result = evaluate()
            errors = Errors.of(result)
    is_bound = not flow.bijection.exact and config.draws > 1 and (exact or not is_traced)
    report = _figures(result, "bits_per_dim", is_bound) if restored.has_bits else {}
    if config.unlabelled:
        of_any = evaluate_split(
            flow, split, config, examples, config.draws, exact, measure=without_label(label.classes)
        )
        of_any = _figures(of_any, "bits_per_dim" if restored.has_bits else "log_likelihood")
        report |= {f"unlabelled_{name}": value for name, value in of_any.items()}
    report |= {
        **({"given": "label"} if is_labelled else {}),
        **_figures(result, "log_likelihood", is_bound),
        "examples": result.examples,
        "draws": result.draws,
        **({"lower_bound": True} if restored.dataset.spec.has_gaps else {}),
        **({"trace": "exact" if exact else f"Hutchinson's, {probes} noises a draw"} if is_traced else {}),
        **({"errors": errors.to_record()} if is_traced else {}),
        **({"weights_column": config.dataset.get("weights")} if split.weights is not None else {}),
        "split": config.split,
        "data": split.description,
        "data_sha256": data_digest(split, restored),
        "dimensions": flow.dimensions,
        "seed": config.seed,
        "weights": restored.weights,
        "checkpoint": config.ckpt,
        "checkpoint_sha256": checkpoint.digest(config.ckpt),
    }
    if config.published:
        logit = None
        if config.published.space == "logit":
            logit = _logit_log_likelihood(flow, split, config, examples, result)
        report["published"] = compare(
            config.published,
            result,
            flow.dimensions,
            config.split,
            restored.dataset.spec.grey_levels,
            split.description,
            logit,
        )
    if distributed.is_main():
        files.write_json(Path(run_dir) / "eval.json", report)
        with open_array(Path(run_dir) / "log_likelihoods.npy", len(result.each)) as write:
            write(result.each.numpy())
        if split.weights is not None:
            with open_array(Path(run_dir) / "example_weights.npy", len(split)) as write:
                write(split.weights.cpu().numpy())
        environment.record(run_dir, distributed.device(), precision="float32")
    return report


def _figures(result: Evaluation, name: str, weighted: bool = False) -> dict:
    """A figure with its standard error; ``weighted``: and that of the importance-weighted bound."""
    names = [name, f"{name}_iw"] if weighted else [name]
    return {key: getattr(result, key) for one in names for key in (one, f"{one}_stderr")}


def _logit_log_likelihood(
    flow: Flow, split: Split, config: EvalConfig, examples: int | None, result: Evaluation
) -> float | None:
    """The log-likelihood in logit space, as MAF reports it for images: ours minus the log-determinant of preprocessing.

    None where :func:`links_to_logits` is.
    """
    preprocess = links_to_logits(flow)
    if preprocess is None:
        return None
    added = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for index, x, context in split_batches(split, config, next(flow.parameters()).device, examples):
            with global_batch.examples(index, config.seed, 0):
                added += torch.tensor([preprocess(x, context)[1].double().sum().item(), len(x)], dtype=torch.float64)
    total, count = distributed.all_sum(added).tolist()
    return result.log_likelihood - total / count


def links_to_logits(flow: Flow) -> Bijection | None:
    """The links from integers to logits; None where there is no logit, or the noise is not uniform."""
    preprocess = getattr(flow.bijection, "preprocess", None)
    links = [] if preprocess is None else [*preprocess.modules()]
    uniform = not any(isinstance(link, VariationalDequantize) for link in links)
    return preprocess if uniform and any(isinstance(link, Logit) for link in links) else None


def compare(
    published: PublishedConfig,
    result: Evaluation,
    dimensions: int,
    split: str,
    grey_levels: int | None,
    description: str,
    logit: float | None = None,
) -> dict:
    """The published figure with ours in its unit and space, or why they cannot be compared.

    ``logit`` is our log-likelihood in logit space, where there is one.
    """
    ours, why = None, None
    if published.split != split:
        why = f"it is for the {published.split} split"
    elif published.data not in description:
        why = f"it is for other data ({published.data})"
    elif published.grey_levels != grey_levels:
        why = f"it is for {published.grey_levels or 'no'} grey levels, not {grey_levels}"
    elif published.unit == "bits_per_dim" and published.space == "integers":
        ours = result.bits_per_dim
    elif published.unit == "nats" and published.space == ("integers" if grey_levels else "standardized"):
        ours = result.log_likelihood
    elif published.unit == "nats" and published.space == "unit":  # the density of (x + u)/grey_levels on [0, 1]
        ours = result.log_likelihood + dimensions * math.log(grey_levels)
    elif published.unit == "nats" and published.space == "logit" and logit is not None:
        ours = logit
    else:
        why = f"it is in {published.unit} in {published.space} space"
    return {**asdict(published), "ours": ours, "not_comparable": why}


def _error_rows(report: dict) -> list[tuple[str, str]]:
    """The parts of the standard error of a flow whose log-determinant comes from traces."""
    errors, trace = report["errors"], report["trace"]
    parts = [("rows", errors["rows"]), ("solver", errors["solver"])]
    if trace != "exact":
        parts.insert(1, ("trace", errors["probes"]))
        trace += f"; variance of one: {errors['trace_variance']:.3g} nats²"
    solves = errors["solves"]
    moves = ", ".join(f"{one['moved']:.2g} at {one['tolerance']:.3g}" for one in solves[1:])
    each = ", ".join(f"{name} {value:.2g}" for name, value in parts if value is not None)
    rows = [("standard error from", f"{each} nats"), ("trace of the ODE" if solves else "log-determinant", trace)]
    if solves:
        rows.append(("tolerance", f"halved from {solves[0]['tolerance']:.3g}; the figure moved by {moves} (nats)"))
    return rows


def _with_two_errors(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{plus_minus(value, 2 * stderr)} (2 standard errors)"


def table(report: dict) -> str:
    rows, nats, stderr = [], report["log_likelihood"], report["log_likelihood_stderr"]
    given = " given the label" if "given" in report else ""
    if "bits_per_dim" in report:
        rows.append((f"bits/dim{given}", plus_minus(report["bits_per_dim"], report["bits_per_dim_stderr"])))
    for name, unit in (("bits_per_dim", "bits/dim"), ("log_likelihood", "nats per row")):
        if (key := f"unlabelled_{name}") in report:
            rows.append((f"{unit} without the label", plus_minus(report[key], report[f"{key}_stderr"])))
    if "bits_per_dim_iw" in report:
        weighted = plus_minus(report["bits_per_dim_iw"], report["bits_per_dim_iw_stderr"])
        rows.append((f"bits/dim, importance-weighted{given}", weighted))
    if rows:
        rows.append(("nats per example", plus_minus(nats, stderr, 3)))
    else:
        rows.append(("nats per row", _with_two_errors(nats, stderr)))
        if "log_likelihood_iw" in report:
            weighted = _with_two_errors(report["log_likelihood_iw"], report["log_likelihood_iw_stderr"])
            rows.append(("nats per row, importance-weighted", weighted))
    rows += [
        ("examples", f"{report['examples']} ({report['split']})"),
        *([("rows weighted by", str(report["weights_column"]))] if "weights_column" in report else []),
        *([("lower bound", "values are missing")] if "lower_bound" in report else []),
        ("noise draws", str(report["draws"])),
        *(_error_rows(report) if "errors" in report else []),
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
