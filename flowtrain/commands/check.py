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
from flowtrain.config.build import build_flow
from flowtrain.data.images import one_hot
from flowtrain.engine.audit import Check, audit, unsettle
from flowtrain.engine.divergence import Record
from flowtrain.engine.measure import measure_of
from flowtrain.engine.precision import autocast_of
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, files
from flowtrain.runtime.checkpoint import load_weights

START, NUMBERS = 64, 2**18  # most examples that initialize a new flow, and most numbers in them


def main(config: CheckConfig, run_dir: str) -> dict:
    """Audit the flow of ``config.ckpt``, or a new one where that is None; print a table (or JSON) and write check.json.

    Raises:
        FlowtrainError: a check has failed.
    """
    if not distributed.is_main():
        return {}
    start = time.monotonic()
    flow = build_flow(config, distributed.device())
    if config.replay:
        return replay(config, flow, run_dir)
    count = sum(parameter.numel() for parameter in flow.parameters())
    if config.ckpt:
        what = f"{load_weights(flow, checkpoint.read(config.ckpt), config.weights)} weights of {config.ckpt}"
        context = _context(config, flow, config.examples)
        try:
            x = draw_samples(flow, config.examples, config.seed, context).to(next(flow.parameters()).device)
        except FlowtrainError:  # not finite; the audit finds out where
            x = _made_up(flow, config, config.examples)
    else:
        what = f"a new {config.model['name']} for {config.dataset['name']}"
        examples = max(config.examples, min(START, NUMBERS // flow.dimensions))
        x, context = _made_up(flow, config, examples), _context(config, flow, examples)
        unsettle(flow, x, context)
        x, context = x[: config.examples], None if context is None else context[: config.examples]
    try:
        checks = list(audit(flow, x, context, config.dataset["levels"], config.jacobian, config.tolerance, config.seed))
    except FloatingPointError as error:
        raise FlowtrainError(f"the flow cannot be run: {error}") from error
    failed = [check for check in checks if not check.passed]
    report = {
        "passed": not failed,
        "checks": [_plain(check) for check in checks],
        "flow": what,
        "dimensions": flow.dimensions,
        "parameters": count,
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


def replay(config: CheckConfig, flow: Flow, run_dir: str) -> dict:
    """Repeat the step at which a run diverged, in ``flow``; print what is found and write check.json.

    Raises:
        FlowtrainError: the step goes wrong again, or the file is not a divergence record.
    """
    state = checkpoint.read(config.replay)
    load_weights(flow, state, "raw")
    autocast = autocast_of(config.precision, distributed.device())
    try:
        record = Record.from_state(state.get("divergence"))
        found = record.replay(flow, measure_of(config.dataset["levels"]), autocast)
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
    line = f"step {record.step} once more, {'as' if same else 'unlike what'} was recorded: {record.told(found)}"
    print(json.dumps(report, indent=2) if config.json else line, flush=True)
    if found:
        raise FlowtrainError(f"step {record.step} goes wrong again: {record.told(found)}")
    return report


def _made_up(flow: Flow, config: CheckConfig, n: int) -> Tensor:
    """n uniform integers of the data's levels, or normal numbers, (n, *shape)."""
    device, levels = next(flow.parameters()).device, config.dataset["levels"]
    if not levels:
        return torch.randn(n, *flow.shape).to(device)
    return torch.randint(0, levels, (n, *flow.shape), dtype=torch.uint8 if levels <= 256 else torch.int64).to(device)


def _context(config: CheckConfig, flow: Flow, n: int) -> Tensor | None:
    """All labels in turn, or normal numbers, like a table's standardized columns; None of an unconditional flow."""
    shape, device = flow.bijection.context_shape, next(flow.parameters()).device
    if shape is None:
        return None
    if config.dataset["context"] == "label":
        return one_hot(torch.arange(n) % shape[0], shape[0]).to(device)
    return torch.randn(n, *shape).to(device)


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
