"""``flowtrain check``: the audit of a checkpoint's flow, or of a new one."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.commands.draws import drawn
from flowtrain.config.build import build_flow
from flowtrain.data.images import one_hot
from flowtrain.engine.audit import Check, audit, perturb
from flowtrain.engine.divergence import Record
from flowtrain.engine.measure import measure_of
from flowtrain.engine.precision import autocast_of
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, files
from flowtrain.runtime.checkpoint import load_weights

STARTING, NUMBERS = 64, 2**18  # a new flow starts from so many examples, of so many numbers together


def main(cfg, run_dir: str) -> dict:
    """Audit the flow of ``cfg.ckpt``, or a new one where that is null; print a table (or JSON) and write check.json.

    Raises:
        FlowtrainError: a check has failed.
    """
    if not distributed.is_main():
        return {}
    begun = time.monotonic()
    flow = build_flow(cfg, distributed.device())
    if cfg.get("replay"):
        return replay(cfg, flow, run_dir)
    count = sum(parameter.numel() for parameter in flow.parameters())
    if cfg.ckpt:
        what = f"{load_weights(flow, checkpoint.read(cfg.ckpt), cfg.weights)} weights of {cfg.ckpt}"
        context = _context(cfg, flow, cfg.examples)
        try:
            x = _drawn(flow, cfg, context)
        except FlowtrainError:  # not finite; the audit will tell where that comes from
            x = _made_up(flow, cfg, cfg.examples)
    else:
        what = f"a new {cfg.model.name} for {cfg.dataset.name}"
        examples = max(cfg.examples, min(STARTING, NUMBERS // flow.dimensions))
        x, context = _made_up(flow, cfg, examples), _context(cfg, flow, examples)
        perturb(flow, x, context)
        x, context = x[: cfg.examples], None if context is None else context[: cfg.examples]
    try:
        checks = list(audit(flow, x, context, cfg.dataset.levels, cfg.jacobian, cfg.tolerance, cfg.seed))
    except FloatingPointError as error:
        raise FlowtrainError(f"the flow cannot be run: {error}") from error
    failed = [check for check in checks if not check.passed]
    report = {
        "passed": not failed,
        "checks": [_plain(check) for check in checks],
        "flow": what,
        "dimensions": flow.dimensions,
        "parameters": count,
        "examples": cfg.examples,
        "seed": cfg.seed,
        "device": str(x.device),
        "seconds": round(time.monotonic() - begun, 1),
    }
    files.write_json(Path(run_dir) / "check.json", report)
    print(json.dumps(report, indent=2) if cfg.json else table(checks, report), flush=True)
    if failed:
        raise FlowtrainError(f"{len(failed)} of {len(checks)} checks failed, first: {_failure(failed[0])}")
    return report


def replay(cfg, flow: Flow, run_dir: str) -> dict:
    """Take the step at which a run went wrong once more, in ``flow``; print what is found and write check.json.

    Raises:
        FlowtrainError: it goes wrong again, or the file is no record of a step.
    """
    state = checkpoint.read(cfg.replay)
    load_weights(flow, state, "raw")
    autocast = autocast_of(cfg.precision, distributed.device())
    try:
        record = Record.from_state(state.get("divergence"))
        found = record.replay(flow, measure_of(cfg.dataset.levels), autocast)
    except Exception as error:  # whatever a stranger's numbers make a flow raise
        reason = " ".join(str(error).split())[:200]
        raise FlowtrainError(f"{cfg.replay}: no record of a step that went wrong ({reason})") from error
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
    print(json.dumps(report, indent=2) if cfg.json else line, flush=True)
    if found:
        raise FlowtrainError(f"step {record.step} goes wrong again: {record.told(found)}")
    return report


def _made_up(flow: Flow, cfg, n: int) -> Tensor:
    """Integers of all levels alike, or normal numbers."""
    device, levels = next(flow.parameters()).device, cfg.dataset.levels
    if not levels:
        return torch.randn(n, *flow.shape).to(device)
    return torch.randint(0, levels, (n, *flow.shape), dtype=torch.uint8 if levels <= 256 else torch.int64).to(device)


def _context(cfg, flow: Flow, n: int) -> Tensor | None:
    """Labels in turn, or normal numbers, as a table's standardized columns are."""
    shape, device = flow.bijection.context_shape, next(flow.parameters()).device
    if shape is None:
        return None
    if cfg.dataset.context == "label":
        return one_hot(torch.arange(n) % shape[0], shape[0]).to(device)
    return torch.randn(n, *shape).to(device)


def _drawn(flow: Flow, cfg, context: Tensor | None) -> Tensor:
    flow.eval()
    return drawn(flow, cfg.examples, cfg.seed, context).to(next(flow.parameters()).device)


def _plain(check: Check) -> dict:
    """For JSON, which has no word for what is not a number."""
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
