"""Measure what each model of conf/model costs: choosing.json, and the tables of choosing.md.

    scripts/choosing [--smoke] [folder]      the folder holds choosing.md; docs/ by default

Times are CPU seconds of this process on one thread; other work on the machine affects them little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import sections
import torch

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.sampling import without_gradients
from flowtrain.benchmarks.timing import time_in_turns
from flowtrain.benchmarks.training_steps import step
from flowtrain.bijections.ode import exact_trace, needs_exact_trace
from flowtrain.config.build import build_flow
from flowtrain.config.compose import conf_dir, train_config
from flowtrain.data.spec import DataSpec
from flowtrain.engine.audit import perturb

IMAGES = (  # models
    "autoregressive",
    "ffjord_image",
    "flowpp",
    "glow",
    "hybrid_image",
    "jet",
    "nsf_image",
    "pixelcnn",
    "realnvp",
    "residual_image",
    "tarflow",
)
OTHERS = ("custom", "custom_image", "cnf_image")  # any layers: nothing to compare; minutes for a batch's exact trace
ROWS = [file.stem for file in sorted((conf_dir() / "model").glob("[!_]*.yaml")) if file.stem not in (*IMAGES, *OTHERS)]
SIZES = {  # name -> shape, grey levels, batch, models
    "D = 2": ((2,), None, 256, ROWS),
    "D = 8": ((8,), None, 256, ROWS),
    "D = 63": ((63,), None, 256, ROWS),
    "8×8 images of one channel, D = 64": ((1, 8, 8), 17, 64, IMAGES),
    "32×32 images of three channels, D = 3072": ((3, 32, 32), 256, 16, IMAGES),
}
WORK = ("log_prob", "training step", "sampling")


def measure(model: str, shape: tuple[int, ...], grey_levels: int | None, batch: int, slice: float) -> dict:
    """The CPU seconds an example of each kind of work, of a model at its default size, with weights that are not at
    their neutral start."""
    config = train_config(f"model={model}", f"dataset={'digits' if grey_levels else 'moons'}")
    flow = build_flow(config, DataSpec("sizes", shape, grey_levels), "cpu")
    x = torch.randint(grey_levels, (batch, *shape)).to(torch.uint8) if grey_levels else torch.randn(batch, *shape)
    with torch.no_grad():
        perturb(flow, x)
    train = step(flow, ours.optimizer, x)

    def training_step():
        flow.train()
        train()

    def density():
        with exact_trace() if needs_exact_trace(flow) else nullcontext():  # as in `flowtrain eval`
            flow(x)

    calls = {"log_prob": density, "sampling": lambda: flow.sample(batch)}
    calls = {name: lambda run=run: without_gradients(flow, run)() for name, run in calls.items()}
    calls["training step"] = training_step
    times = time_in_turns(calls, 3, 0.0, random.Random(0), lambda: None, slice, time.process_time)
    return {
        "model": model,
        "parameters": sum(p.numel() for p in flow.parameters()),
        **{name: statistics.median(times[name]) / batch for name in WORK},
    }


def tables(found: dict) -> str:
    """A sentence on the machine, and a table for each size, the fastest likelihood first."""
    machine, parts = found["machine"], []
    parts.append(
        f"{machine['date']}: torch {machine['torch']}, one thread of a CPU ({machine['architecture']}). CPU time an"
        " example."
    )
    for size, rows in found["sizes"].items():
        batch = found["batch"][size]
        parts.append(f"**{size}**, batches of {batch}:")
        lines = [["`model=`", "parameters", *WORK, "sampling ÷ log_prob"], ["---", *["---:"] * 5]]
        for row in sorted(rows, key=lambda row: row["log_prob"]):
            each = [micro(row[name]) for name in WORK]
            name = f"`{row['model']}`"
            lines.append([name, f"{row['parameters']:,}", *each, f"{row['sampling'] / row['log_prob']:.2g}"])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def micro(seconds: float) -> str:
    """A time with two significant digits."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size or unit == "µs":
            value = float(f"{seconds / size:.2g}")
            return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description="measure what each model costs")
    parser.add_argument("folder", nargs="?", default="docs", type=Path, help="folder of choosing.md (default: docs)")
    parser.add_argument("--smoke", action="store_true", help="two models at one size, to test the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict = {"sizes": {}, "batch": {}}
    for size, (shape, grey_levels, batch, models) in [*SIZES.items()][: 1 if options.smoke else None]:
        found["batch"][size], found["sizes"][size] = batch, []
        for model in models[:2] if options.smoke else models:
            row = measure(model, shape, grey_levels, batch, 1e-9 if options.smoke else 0.1)
            found["sizes"][size].append(row)
            print(f"{time.process_time():6.0f} s  {size}: {row}", file=sys.stderr, flush=True)
    found["machine"] = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "architecture": os.uname().machine,
    }
    (options.folder / "choosing.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    sections.write(options.folder / "choosing.md", "costs", tables(found))


if __name__ == "__main__":
    main()
