"""Every family on the device: log-likelihoods beside a CPU's, training steps, reads of the host, the audit."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from functools import partial

import torch
from choosing import IMAGES, ROWS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flowtrain.bijections.ode import continuous_layers, exact_trace, needs_exact_trace
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.compose import train_config
from flowtrain.engine.audit import audit, perturb
from flowtrain.engine.evaluate import exact_arithmetic
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch
from on_gpu.part import Part, Place, number, verdict
from on_gpu.training import around_steps, launches, take_steps, trainer_of

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of log p, relative where it is above 1
ODE_LIMITS = {torch.float64: 1e-6, torch.float32: 2e-3}  # a solver may take other steps
READS = ("aten::_local_scalar_dense", "aten::nonzero")
WORDS = [
    *(f"model={model} dataset=digits" for model in IMAGES),
    *(f"model={model} dataset=moons" for model in ROWS),
    "model=glow dataset=digits mixing=plain",
    "model=glow dataset=digits mixing=permuted_lu_actnorm",
    "model=glow dataset=digits univariate=rational_quadratic",
    "model=glow dataset=digits univariate=mixture_logistic",
    "model=glow dataset=digits dataset.context=label base=class_normal",
    "model=maf dataset=moons base=mixture",
    "experiment=digits_best",
]


def family(place: Place, words: str) -> dict:
    """Compare a flow's log-likelihoods on two devices; train it for 20 steps; audit it."""
    small = ["smoke=true"] if place.tiny else []
    config = train_config(*words.split(), *small)
    data = build_dataset(config)
    x, context = data.split("train").take(torch.arange(64))
    flow = build_flow(config, data.spec, "cpu")
    with torch.no_grad():
        perturb(flow, x, context)
    x, context = x[:16], None if context is None else context[:16]
    limits = ODE_LIMITS if continuous_layers(flow) else LIMITS
    errors = {kind: error(flow, kind, x, context, place.device) for kind in limits}
    there = [None if one is None else one[:8].to(place.device) for one in (x, context)]
    checks = audit(copy.deepcopy(flow).to(place.device), *there, data.spec.grey_levels, limit=256)
    wrong = [f"{one.name} {one.layer}: {one.value:.2g} > {one.tolerance:.2g}" for one in checks if not one.passed]
    steps = train(place, words.split() + small)
    close = all(errors[kind] <= limit for kind, limit in limits.items())
    reads = steps["reads"] <= 1 or bool(continuous_layers(flow))
    return {
        "float64": errors[torch.float64],
        "float32": errors[torch.float32],
        **steps,
        "audit": wrong,
        "passed": close and reads and not wrong and all(map(math.isfinite, steps["loss"])) and not steps["skipped"],
    }


@torch.no_grad()
def error(flow: Flow, kind: torch.dtype, x: Tensor, context: Tensor | None, device: torch.device) -> float:
    """The greatest difference of log p between the CPU and ``device``, relative where it is above 1."""
    x, context = (one.to(kind) if one is not None and one.is_floating_point() else one for one in (x, context))
    trace = exact_trace if needs_exact_trace(flow) else nullcontext
    found = []
    with exact_arithmetic(), global_batch.bin_centres(), trace():  # without noise, which differs between devices
        for where in ("cpu", device):
            mine = copy.deepcopy(flow).eval().to(where, kind)
            found.append(mine(x.to(where), None if context is None else context.to(where)).double().cpu())
    ours, theirs = found
    return ((ours - theirs).abs() / ours.abs().clamp(min=1)).max().item()


def train(place: Place, words: list[str]) -> dict:
    """Train for 20 steps; the last ten are watched for reads of the host, of which one a step is needed."""
    trainer = trainer_of(place, *words, "batch_size=16", "compile=false", *launches(graph=False))
    reads = []

    def step(take):
        if trainer.step < 10:
            return take()
        with Reads(place.device) as found:
            result = take()
        reads.append(found.count)
        return result

    around_steps(trainer, step)
    losses = [report[f"train/{trainer.objective.key}"] for report in take_steps(trainer, 20)]
    return {"loss": [losses[0], losses[-1]], "skipped": trainer.recovery.skipped, "reads": max(reads)}


class Reads:
    """Counts how often the host waits for a value: torch says so on a GPU; on a CPU the profiler sees the operation."""

    def __init__(self, device: torch.device):
        self.cuda, self.count = device.type == "cuda", 0
        self.seen = warnings.catch_warnings(record=True)
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def __enter__(self) -> Reads:
        if self.cuda:
            self.list = self.seen.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self.tolist = torch.Tensor.tolist
            torch.Tensor.tolist = lambda tensor: self.read_list(tensor)  # which the profiler does not see
            self.profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")
            self.count = sum("synchronizing" in str(one.message) for one in self.list)
            self.seen.__exit__(*error)
        else:
            torch.Tensor.tolist = self.tolist
            self.profile.__exit__(*error)
            events = self.profile.events()
            of_optimizer = [one for one in events if one.name in READS and _within(one, "aten::_fused_adam")]
            self.count += sum(one.name in READS for one in events) - len(of_optimizer)

    def read_list(self, tensor: Tensor) -> list:
        self.count += 1
        return self.tolist(tensor)


def _within(event, name: str) -> bool:
    """A CPU's fused optimizer reads its own count of steps; a GPU's does so on the device."""
    return event is not None and (event.name.startswith(name) or _within(event.cpu_parent, name))


PART = Part(
    "families",
    "Every family: the greatest error of log p beside a CPU's, relative where |log p| > 1 (limits 1e-9 and 1e-4; of a "
    "solver's 1e-6 and 2e-3), 20 training steps, reads of the host in a step, and the audit.",
    {words: partial(family, words=words) for words in WORDS},
    {
        "float64": number("float64", ".1g"),
        "float32": number("float32", ".1g"),
        "reads a step": number("reads", "d"),
        "audit": lambda row: "; ".join(row["audit"]) or "passed",
        "passed": verdict,
    },
    seconds=200,
    processes=3,
    rehearsed=("model=glow dataset=digits", "model=nsf_coupling dataset=moons", "model=ffjord dataset=moons"),
)
