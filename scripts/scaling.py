"""Measure how time and memory grow on this machine: scaling.json, scaling.png and the tables of scaling.md.

    scripts/scaling [--smoke] [folder]      the folder holds scaling.md; docs/ by default

Times are CPU seconds of this process on one thread; other work on the machine affects them little.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import scaling_page
import scaling_parallel
import torch
from torch import Tensor

from flowtrain import flows
from flowtrain.benchmarks import ours
from flowtrain.benchmarks.sampling import without_gradients
from flowtrain.benchmarks.timing import Spread, Times, ratio, time_in_turns
from flowtrain.benchmarks.training_steps import step
from flowtrain.bijections import MixtureNormal
from flowtrain.bijections.ode import exact_trace, needs_exact_trace
from flowtrain.data.loader import Loader, evaluation_batches
from flowtrain.data.split import ArraySplit
from flowtrain.distributions import Logistic
from flowtrain.engine.evaluate import evaluate
from flowtrain.engine.peak import peak_bytes
from flowtrain.flow import Flow


def glow_vector(dimensions: int, hidden: int, steps: int) -> Flow:
    """Glow's steps for vectors: the only family here with a dense linear layer, of D² weights."""
    return flows.glow_vector((dimensions,), steps=steps, hidden=hidden)


FAMILIES = {
    "MAF": ours.maf,
    "NSF coupling": ours.nsf_coupling,
    "NSF autoregressive": ours.nsf_autoregressive,
    "Glow's steps": glow_vector,
}
VECTOR_MODELS = {  # the models of conf/model
    **{
        name: getattr(flows, name)
        for name in ("ffjord", "glow_vector", "hybrid", "iaf", "made", "maf", "maf_mog", "nice")
    },
    "made_mog": partial(flows.made, univariate=MixtureNormal, base=Logistic),
    **{name: getattr(flows, name) for name in ("nsf_autoregressive", "nsf_coupling", "realnvp_vector")},
}
WORK = ("density", "training step", "sampling")


@dataclass(frozen=True)
class Sizes:
    growing: tuple[str, ...]  # families
    base: dict[str, int]
    axes: dict[str, tuple[int, ...]]  # each varies while the others keep their values of ``base``
    autoregressive: dict[str, tuple[tuple[int, int, int], ...]]  # family -> (D, hidden, layers)
    batch: int  # of the autoregressive families
    families: tuple[int, int]  # D and batch of the comparison of all families
    rows: tuple[int, ...]
    parallel: scaling_parallel.Sizes


FULL = Sizes(
    growing=tuple(FAMILIES),
    base={"D": 64, "width": 256, "depth": 4, "batch": 256},
    axes={
        "D": (16, 64, 256, 1024),
        "width": (64, 256, 1024),
        "depth": (2, 4, 8, 16),
        "batch": (64, 256, 1024, 4096),
    },
    autoregressive={
        "MAF": ((64, 512, 2), (256, 512, 2), (1024, 1024, 2), (3072, 3072, 2)),
        "NSF autoregressive": ((64, 512, 1), (256, 512, 1), (1024, 1024, 1), (3072, 3072, 1)),
    },
    batch=1000,
    families=(64, 256),
    rows=(1024, 4096, 16384, 65536),
    parallel=scaling_parallel.FULL,
)
SMOKE = Sizes(
    growing=("MAF",),
    base={"D": 6, "width": 8, "depth": 2, "batch": 8},
    axes={"D": (4, 6), "width": (8, 16), "depth": (2, 4), "batch": (128, 256)},
    autoregressive={"MAF": ((4, 8, 1), (8, 8, 1)), "NSF autoregressive": ((4, 8, 1),)},
    batch=8,
    families=(4, 8),
    rows=(64, 128),
    parallel=scaling_parallel.SMOKE,
)


def measure(sizes: Sizes, slice: float) -> dict:
    """Measure everything. A call shorter than ``slice`` seconds is repeated until it takes that long."""
    clock = Clock(slice)
    return {
        "base": sizes.base,
        "growth": [one for axis in sizes.axes for one in measure_growth(sizes, axis, clock)],
        "rows": measure_rows(sizes.rows, clock),
        "autoregressive": measure_autoregressive(sizes, clock),
        "families": measure_families(*sizes.families, clock),
        "parallel": scaling_parallel.measure(sizes.parallel),
    }


class Clock:
    """Measures the CPU seconds of variants in turns, in three rounds."""

    def __init__(self, slice: float):
        self.slice, self.order = slice, random.Random(0)

    def __call__(self, variants: dict[str, Callable[[], object]]) -> Times:
        return time_in_turns(variants, 3, 0.0, self.order, lambda: None, self.slice, time.process_time)


def calls(flow: Flow, x: Tensor) -> dict[str, Callable[[], None]]:
    """The calls to time, by their name, each on a batch like ``x``. A training step changes no other call's cost."""
    train = step(flow, ours.optimizer, x)

    def training_step():
        flow.train()
        train()

    def evaluation(run: Callable[[], object]) -> Callable[[], None]:
        def inner():
            flow.eval()
            with torch.no_grad():
                run()

        return inner

    return {
        "density": evaluation(lambda: flow(x)),
        "training step": training_step,
        "sampling": evaluation(lambda: flow.sample(len(x))),
    }


def measure_growth(sizes: Sizes, axis: str, clock: Clock) -> Iterable[dict]:
    """Measure the seconds and bytes of each family along one axis, and the powers with which they grow."""
    for family in sizes.growing:
        say(f"{family} by {axis}")
        points = {}
        for value in sizes.axes[axis]:
            size = sizes.base | {axis: value}
            x = torch.randn(size["batch"], size["D"])
            points[value] = calls(
                ours.build_perturbed(partial(FAMILIES[family], size["D"], size["width"], size["depth"]), x, 0), x
            )
        for work in WORK:
            times = clock({value: point[work] for value, point in points.items()})
            yield curve(family, axis, work, "s", times)
        for work in WORK[:2]:
            yield curve(family, axis, work, "B", {value: [peak_bytes(point[work])] for value, point in points.items()})


def curve(family: str, axis: str, work: str, unit: str, measured: dict[int, list[float]]) -> dict:
    """A measured curve with its exponents, which are fitted in each round separately.

    ``measured``: value on the axis -> the measurement of each round.
    """
    values, series = list(measured), list(zip(*measured.values(), strict=True))
    return {
        "family": family,
        "axis": axis,
        "work": work,
        "unit": unit,
        "at": values,
        "measured": [Spread.of(list(found)).median for found in measured.values()],
        "exponent": spread([fit_exponent(values, one) for one in series]),
        "last_exponent": spread([fit_exponent(values[-2:], one[-2:]) for one in series]),
    }


def fit_exponent(x: Iterable[float], y: Iterable[float]) -> float:
    """Fit the slope of log y over log x by least squares."""
    x, y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (x, y))
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def spread(values: list[float]) -> dict[str, float]:
    """The median and half range of ``values``."""
    return vars(Spread.of(values))


def measure_rows(counts: tuple[int, ...], clock: Clock) -> list[dict]:
    """Measure what the rows of a data set in memory cost in evaluation, an epoch's batches, and a training step."""
    say("rows of data")
    dimensions, batch = 64, min(512, *counts)
    flow = ours.build_perturbed(partial(ours.maf, dimensions, 64, 1), torch.randn(batch, dimensions), 0)
    evaluation, epoch, train = {}, {}, {}
    for count in counts:
        split = ArraySplit(torch.randn(count, dimensions))
        evaluation[count] = lambda split=split: evaluate(flow, evaluation_batches(split, batch), len(split))
        epoch[count] = lambda loader=Loader(split, batch): [
            None for _ in zip(range(loader.steps_per_epoch), loader.batches())
        ]
        train[count] = training_step(copy.deepcopy(flow), Loader(split, batch))
    runs = {"evaluation": evaluation, "an epoch's batches": epoch, "a training step": train}
    seconds = [curve("MAF", "rows", work, "s", clock(run)) for work, run in runs.items()]
    peaks = {work: {count: [peak_bytes(once)] for count, once in run.items()} for work, run in runs.items()}
    return seconds + [curve("MAF", "rows", work, "B", peak) for work, peak in peaks.items()]


def training_step(flow: Flow, loader: Loader) -> Callable[[], None]:
    """A training step on the next batch."""
    batches = loader.batches()
    x = torch.empty(loader.batch_size, *flow.shape)
    run = step(flow, ours.optimizer, x)

    def inner():
        x.copy_(next(batches)[0])
        run()

    return inner


def measure_autoregressive(sizes: Sizes, clock: Clock) -> list[dict]:
    """Measure the cost of sampling as a multiple of a density pass over as many examples."""
    found = []
    for family, points in sizes.autoregressive.items():
        for dimensions, hidden, layers in points:
            say(f"{family}: sampling at D = {dimensions}")
            x = torch.randn(sizes.batch, dimensions)
            flow = ours.build_perturbed(partial(FAMILIES[family], dimensions, hidden, layers), x[:64], 0)
            times = clock(
                {
                    "density": without_gradients(flow, lambda: flow(x)),
                    "sampling": without_gradients(flow, lambda: flow.sample(len(x))),
                }
            )
            found.append(
                {
                    "family": family,
                    "D": dimensions,
                    "hidden": hidden,
                    "layers": layers,
                    "batch": len(x),
                    **{work: Spread.of(seconds).median for work, seconds in times.items()},
                    "ratio": vars(ratio(times, "sampling", "density")),
                }
            )
    return found


def measure_families(dimensions: int, batch: int, clock: Clock) -> list[dict]:
    """Measure the seconds an example of every model of conf/ for vectors, at its default size."""
    found = []
    for model, constructor in VECTOR_MODELS.items():
        say(f"{model} at D = {dimensions}")
        x = torch.randn(batch, dimensions)
        flow = ours.build_perturbed(partial(constructor, (dimensions,)), x, 0).eval()
        with exact_trace() if needs_exact_trace(flow) else nullcontext():  # as in `flowtrain eval`
            times = clock(
                {
                    "density": without_gradients(flow, lambda: flow(x)),
                    "sampling": without_gradients(flow, lambda: flow.sample(batch)),
                }
            )
        found.append(
            {
                "model": model,
                "parameters": sum(p.numel() for p in flow.parameters()),
                "D": dimensions,
                "batch": batch,
                **{work: Spread.of(seconds).median / batch for work, seconds in times.items()},
            }
        )
    return found


def say(text: str) -> None:
    """Print a line of progress with the CPU seconds so far."""
    print(f"{time.process_time():6.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure how time and memory grow")
    parser.add_argument("folder", nargs="?", default="docs", type=Path, help="the folder of scaling.md (default: docs)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, start = os.getloadavg()[0], time.process_time()
    found = measure(SMOKE if options.smoke else FULL, 1e-9 if options.smoke else 0.02)
    found["machine"] = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load": [load, os.getloadavg()[0]],
        "cpu_seconds": time.process_time() - start,
    }
    (options.folder / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    scaling_page.write(found, options.folder)
    say(f"{options.folder}/scaling.md")


if __name__ == "__main__":
    main()
