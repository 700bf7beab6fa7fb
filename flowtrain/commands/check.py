"""``flowtrain check``: the audit of a checkpoint's flow, or of a new one."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.commands import CheckConfig
from flowtrain.commands.draws import draw_samples
from flowtrain.commands.posterior_calibration import calibrate
from flowtrain.commands.restored import restore
from flowtrain.config.build import build_dataset, build_flow, build_objective, model_name
from flowtrain.data.labels import label_context
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.engine.audit import Check, audit, perturb
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.engine.precision import autocast_dtype, tf32_as
from flowtrain.engine.replay import Record
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, files

START, NUMBERS = 64, 2**18  # most examples that initialize a new flow, and most numbers in them


def main(config: CheckConfig, run_dir: str) -> dict:
    """Audit the flow of ``config.ckpt``, or a new one where that is None; print a table (or JSON) and write check.json.

    Raises:
        FlowtrainError: a check has failed.
    """
    if not distributed.is_main():
        return {}
    start = time.monotonic()
    if config.calibration:
        if not config.ckpt:
            raise UsageError("calibration=true: needs a run, ckpt=PATH, and takes no model and no replay")
        return calibrate(config, run_dir)
    if config.replay:
        return replay(config, run_dir)
    if config.ckpt:
        restored = restore(config, config.ckpt, config.weights)
        flow, spec = restored.flow, restored.dataset.spec
        what = f"{restored.weights} weights of {config.ckpt}"
        context = _context(spec, flow, config.examples)
        try:
            x = draw_samples(flow, config.examples, config.seed, context).to(next(flow.parameters()).device)
        except FlowtrainError:  # not finite; the audit finds out where
            x = _made_up_data(spec, flow, config.examples)
    else:
        spec = build_dataset(config).spec
        flow = build_flow(config, spec, distributed.device())
        what = f"a new {model_name(config)} for {spec.name}"
        examples = max(config.examples, min(START, NUMBERS // flow.dimensions))
        x, context = _made_up_data(spec, flow, examples), _context(spec, flow, examples)
        perturb(flow, x, context)
        x, context = x[: config.examples], None if context is None else context[: config.examples]
    less = "a smaller examples=N or jacobian=N would need less"
    try:
        with out_of_memory(x.device, "the audit in float64", less):
            checks = list(audit(flow, x, context, spec.grey_levels, config.jacobian, config.tolerance, config.seed))
    except FloatingPointError as error:
        raise FlowtrainError(f"the flow cannot be run: {error}") from error
    failed = [check for check in checks if not check.passed]
    report = {
        "passed": not failed,
        "checks": [_plain(check) for check in checks],
        "flow": what,
        "dimensions": flow.dimensions,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "examples": config.examples,
        "seed": config.seed,
        "device": str(x.device),
        "seconds": round(time.monotonic() - start, 1),
    }
    files.write_json(Path(run_dir) / "check.json", report)
    print(json.dumps(report, indent=2) if config.json else table(checks, report), flush=True)
    if failed:
        raise FlowtrainError(f"{len(failed)} of {len(checks)} checks failed, first: {_failure(failed[0])}")
    return report


def replay(config: CheckConfig, run_dir: str) -> dict:
    """Repeat the step at which a run diverged; print what is found and write check.json.

    Raises:
        FlowtrainError: the step goes wrong again, or the file is not a divergence record.
    """
    restored, state = restore(config, config.replay, "raw"), checkpoint.read(config.replay)
    objective = build_objective(config, restored.dataset.spec)
    autocast = autocast_dtype(config.precision, distributed.device())
    try:
        record = Record.from_state_dict(state.get("divergence"))
        with tf32_as(config.precision):
            found = record.replay(restored.flow, objective, autocast)
    except Exception as error:  # whatever a flow raises for a stranger's numbers
        reason = " ".join(str(error).split())[:200]
        raise FlowtrainError(f"{config.replay}: no record of a step that went wrong ({reason})") from error
    same = found == record.found
    report = {
        "passed": found is None,
        "step": record.step,
        "layer": found and found.layer,
        "what": found and found.what,
        "examples": [record.examples[row] for row in found.rows] if found else [],
        "as_recorded": same,
    }
    files.write_json(Path(run_dir) / "check.json", report)
    line = f"step {record.step} once more, {'as' if same else 'unlike what'} was recorded: {record.describe(found)}"
    print(json.dumps(report, indent=2) if config.json else line, flush=True)
    if found:
        raise FlowtrainError(f"step {record.step} goes wrong again: {record.describe(found)}")
    return report


def _made_up_data(spec: DataSpec, flow: Flow, n: int) -> Tensor:
    """n uniform integers of the data's grey levels, or normal numbers, (n, *shape)."""
    device, grey_levels = next(flow.parameters()).device, spec.grey_levels
    if not grey_levels:
        return torch.randn(n, *flow.shape).to(device)
    return torch.randint(0, grey_levels, (n, *flow.shape), dtype=torch.uint8 if grey_levels <= 256 else torch.int64).to(
        device
    )


def _context(spec: DataSpec, flow: Flow, n: int) -> Tensor | None:
    """All labels in turn, or normal numbers, like a table's standardized columns; None of an unconditional flow."""
    device = next(flow.parameters()).device
    if spec.context is None:
        return None
    if isinstance(spec.context, LabelContext):
        return label_context(torch.arange(n) % spec.context.classes, spec.context.classes).to(device)
    return torch.randn(n, *spec.context.shape).to(device)


def _plain(check: Check) -> dict:
    """A check for JSON, which has no NaN."""
    return {**asdict(check), "value": check.value if math.isfinite(check.value) else None, "passed": check.passed}


def _failure(check: Check) -> str:
    where = f" ({check.layer})" if check.layer else ""
    return f"{check.name}{where} is {check.value:.3g}, more than {check.tolerance:g}"


def table(checks: list[Check], report: dict) -> str:
    head = ("check", "value", "tolerance", "", "worst layer", "")
    rows = [
        (
            check.name,
            f"{check.value:.2g}",
            f"{check.tolerance:g}",
            "pass" if check.passed else "FAIL",
            check.layer or "",
            check.note,
        )
        for check in checks
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    verdict = "passed" if report["passed"] else "FAILED"
    lines.append(f"{verdict}: {report['flow']}, D = {report['dimensions']}, {report['seconds']:g} s")
    return "\n".join(lines)
