"""Measure the cost of communication between processes that train together, and predict it for many GPUs."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.timing import Spread, time_in_turns
from flowtrain.benchmarks.training_steps import step
from flowtrain.cli import exit_codes
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.compose import train_config
from flowtrain.engine.training_pass import synchronize_gradients
from flowtrain.runtime import distributed
from flowtrain.runtime.global_batch import RunningMoments

FLOWS = {"MAF": ours.maf, "NSF coupling": ours.nsf_coupling}
WARM_UP, PROFILE_STEPS = 5, 5
REPEATS = 20  # all-reduces in one measurement


@dataclass(frozen=True)
class Sizes:
    flows: dict[str, tuple[int, int, int]]  # D, hidden, layers
    batch: int  # of each process
    rounds: int
    messages: tuple[int, ...]  # bytes
    presets: dict[str, tuple[int, tuple[str, ...]]]  # experiment -> examples in a measured step, overrides


FULL = Sizes(
    flows={"MAF": (43, 512, 5), "NSF coupling": (43, 256, 10)},
    batch=512,
    rounds=9,
    messages=(1 << 12, 1 << 16, 1 << 20, 1 << 24),
    presets={"glow_cifar10": (2, ()), "nsf_cifar10": (2, ()), "nsf_coupling_bsds300": (512, ())},
)
SMOKE = Sizes(
    flows={"MAF": (4, 8, 2), "NSF coupling": (4, 8, 2)},
    batch=8,
    rounds=3,
    messages=(1 << 10, 1 << 12),
    presets={"nsf_coupling_power": (8, ("smoke=true",))},
)


def measure(sizes: Sizes) -> dict:
    """Measure two processes with gloo and the presets, and predict the presets' steps on many GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (2, sizes, folder), nprocs=2)
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    presets = [_measure_preset(name, *options) for name, options in sizes.presets.items()]
    return {**ranks[0], "presets": presets, "model": [row for preset in presets for row in predict(preset)]}


# ---- two processes, gloo


def _run_rank(rank: int, world: int, sizes: Sizes, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), FLOWTRAIN_STORE=f"{folder}/store")
    distributed.init()
    flows = [_measure_flow(name, size, sizes) for name, size in sizes.flows.items()]
    found = {"flows": flows, "messages": [_measure_message(size, sizes.rounds) for size in sizes.messages]}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.close()
    exit_codes.leave(0)


def _time_in_turns(variants: dict, rounds: int, clock) -> dict[str, list[float]]:
    """Time each variant once a round; all processes start and end each call together, in the same order."""
    return time_in_turns(variants, rounds, math.inf, random.Random(0), dist.barrier, 1e-9, clock)


def _measure_flow(name: str, size: tuple[int, int, int], sizes: Sizes) -> dict:
    """Time a training step that all-reduces its gradients, and the same step without communication."""
    x = torch.randn(sizes.batch, size[0])
    alone, shared = (ours.build_perturbed(partial(FLOWS[name], *size), x, 0) for _ in range(2))
    run = step(synchronize_gradients(shared, static_graph=True), ours.optimizer, x)
    variants = {"alone": step(alone, ours.optimizer, x), "shared": run}
    for _ in range(WARM_UP):
        run()
    found = {"flow": name, "size": size, "batch": sizes.batch, "gradient_bytes": _bytes(shared)}
    for clock in (time.perf_counter, time.process_time):
        times = _time_in_turns(variants, sizes.rounds, clock)
        overhead = [a - b for a, b in zip(times["shared"], times["alone"], strict=True)]
        found[clock.__name__] = {
            **{variant: vars(Spread.of(seconds)) for variant, seconds in times.items()},
            "overhead": vars(Spread.of(overhead)),
        }
    return {**found, "profile": _profile(run)}


def _profile(run) -> list[dict]:
    """Profile some steps: when backward and each all-reduce ran, in milliseconds from the step's start."""
    steps = []
    for _ in range(PROFILE_STEPS):
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as record:
            run()
        events = [(event.name, event.time_range.start, event.time_range.end) for event in record.events()]
        start = min(first for _, first, _ in events)
        backward = _spans(events, "autograd::engine::evaluate_function", start)
        steps.append(
            {
                "backward": [min(first for first, _ in backward), max(end for _, end in backward)],
                "all_reduce": sorted(_spans(events, "gloo:all_reduce", start)),
                "step": max(end for _, _, end in events) / 1e3 - start / 1e3,
            }
        )
    return steps


def _spans(events: list, name: str, start: float) -> list[tuple[float, float]]:
    return [((first - start) / 1e3, (last - start) / 1e3) for event, first, last in events if event.startswith(name)]


def _measure_message(size: int, rounds: int) -> dict:
    """Time an all-reduce of ``size`` bytes."""
    message = torch.zeros(size // 4)
    variants = {
        "all_reduce": lambda: [dist.all_reduce(message) for _ in range(REPEATS)],
        "empty": lambda: None,
    }
    found = {"bytes": size}
    for clock in (time.perf_counter, time.process_time):
        times = _time_in_turns(variants, rounds, clock)
        pairs = zip(times["all_reduce"], times["empty"], strict=True)
        differences = [(full - empty) / REPEATS for full, empty in pairs]
        found[clock.__name__] = vars(Spread.of(differences))
    return found


def _bytes(flow) -> int:
    return sum(parameter.nbytes for parameter in flow.parameters())


# ---- presets at their full size, and many GPUs


def _measure_preset(name: str, examples: int, overrides: tuple[str, ...]) -> dict:
    """Measure a preset's training step on this core: its operations, its seconds, and the bytes it sends."""
    print(f"        {name}", file=sys.stderr, flush=True)
    cfg = train_config(f"experiment={name}", *overrides)
    spec = build_dataset(cfg).spec
    flow, levels = build_flow(cfg, spec, "cpu"), spec.grey_levels
    shape = (examples, *flow.shape)
    x = torch.randint(0, levels, shape, dtype=torch.uint8) if levels else torch.randn(shape)
    flow.initialize(x)
    run = step(flow, ours.optimizer, x)
    with FlopCounterMode(display=False) as counter, _Kernels() as kernels:
        run()
    seconds = time_in_turns({"step": run}, 3, 0.0, random.Random(0), lambda: None, 1e-9, time.process_time)["step"]
    return {
        "preset": name,
        "batch": cfg.batch_size,
        "gradient_bytes": _bytes(flow),
        "flops": counter.get_total_flops() / examples,
        "seconds": Spread.of(seconds).median / examples,
        "kernels": kernels.count,
        "small": 1 + 4 * sum(isinstance(module, RunningMoments) for module in flow.modules()),
    }


class _Kernels(TorchDispatchMode):
    """Counts operations that create or change a tensor; on a GPU each is a kernel launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


# Assumptions of the model; none is measured.
SPEED = 20e12  # operations a second of a GPU
LAUNCH = 5e-6  # seconds to launch a kernel
BACKWARD = 2 / 3  # share of a step's operations
BUCKET = 25 * 2**20  # bytes; the default of DDP
LINKS = {8: (200e9, 5e-6), 64: (50e9, 10e-6)}  # GPUs -> bytes a second and seconds a hop of the ring's slowest link


def predict(preset: dict) -> list[dict]:
    """Predict the step on 8 and 64 GPUs, with the preset's batch divided among all and with an eighth of it on each."""
    rows = []
    for count, (bandwidth, hop) in LINKS.items():
        for batch in sorted({preset["batch"] // count, preset["batch"] // min(LINKS)}):
            compute = max(preset["flops"] * batch / SPEED, preset["kernels"] * LAUNCH)
            size = preset["gradient_bytes"]
            last = min(size, BUCKET)  # complete only when backward ends
            hidden = ring(size - last, count, bandwidth, hop) - BACKWARD * compute
            small = preset["small"] * tree(count, hop)
            exposed = ring(last, count, bandwidth, hop) + max(0.0, hidden) + small
            rows.append(
                {
                    "preset": preset["preset"],
                    "gpus": count,
                    "batch": batch,
                    "compute": compute,
                    "all_reduce": ring(size, count, bandwidth, hop),
                    "exposed": exposed,
                    "efficiency": compute / (compute + exposed),
                }
            )
    return rows


def ring(size: float, count: int, bandwidth: float, hop: float) -> float:
    """Seconds of a ring all-reduce: 2(N − 1) hops, each with 1/N of the message."""
    return 2 * (count - 1) * (hop + size / count / bandwidth)


def tree(count: int, hop: float) -> float:
    """Seconds of an all-reduce of a few numbers, up and down a binary tree."""
    return 2 * math.ceil(math.log2(count)) * hop
