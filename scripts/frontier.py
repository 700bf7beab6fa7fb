"""Kinds of image flows, trained for the same time: see scripts/frontier."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sections
import torch
from matplotlib.figure import Figure

import flowtrain
from flowtrain.runtime import files

ROOT = Path(__file__).parent.parent
MODELS = {
    "Real NVP": ["model=realnvp"],
    "Glow": ["model=glow"],
    "Glow, splines": ["model=nsf_image"],
    "Glow, variational noise": ["model=glow", "dequantize=variational"],
    "Flow++": ["model=flowpp", "dequantize=variational"],
    "Jet": ["model=jet"],
    "TarFlow": ["model=tarflow"],
    "FFJORD": ["model=ffjord_image"],
    "flow matching": ["model=cnf_image", "objective=flow_matching"],
    "residual flow": ["model=residual_image"],
    "PixelCNN": ["model=pixelcnn", "model.components=10"],
}
OWN_NOISE = ("PixelCNN",)  # takes integers as they are
ALPHA = {"mnist": 0.002, "cifar10": 0.05}
EXAMPLES, DRAWS, SAMPLES, SMOKE = 2000, 8, 64, ["smoke=true"]
QUIET = ["report=false", "trainer.sample_every=null"]
HEAD = ["model", "bits/dim", "IW", "parameters", "minutes", "steps", "seconds for 64 samples", "samples"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kinds of image flows, trained for the same time.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--data", default="mnist,cifar10")
    parser.add_argument("--smoke", action="store_true", help="three steps of tiny models, on digits")
    parser.add_argument("folder", nargs="?", default=str(ROOT))
    args = parser.parse_args()
    folder = Path(args.folder)
    path = folder / "results" / "frontier.json"
    grids = folder / "docs" / "frontier"
    path.parent.mkdir(exist_ok=True, parents=True)
    grids.mkdir(exist_ok=True, parents=True)
    found = json.loads(path.read_text()) if path.is_file() else {"machine": platform.machine()}
    budget = SMOKE if args.smoke else ["max_steps=null", f"max_minutes={args.minutes}"]
    for data in ["digits"] if args.smoke else args.data.split(","):
        rows = found.setdefault(data, {})
        for model in MODELS:
            setting = {"minutes": args.minutes, "devices": args.devices}
            if not setting.items() <= rows.get(model, {}).items():
                rows[model] = setting | measure(model, data, [*budget, f"devices={args.devices}"], grids, args.smoke)
                print(f"{data}: {model}: {rows[model]}", flush=True)
                files.write_json(path, found)
    draw(found, grids.parent / "frontier.png")
    page = grids.parent / "frontier.md"
    if page.is_file():
        sections.write(page, "frontier", tables(found))
    print(tables(found))


def measure(model: str, data: str, words: list[str], grids: Path, smoke: bool) -> dict:
    """The figures of a run, and its grid of samples."""
    if model not in OWN_NOISE and data in ALPHA:
        words = [*words, "preprocess=logit", f"preprocess.alpha={ALPHA[data]}"]
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        _flowtrain("train", f"dataset={data}", *MODELS[model], *words, *QUIET, f"hydra.run.dir={run}")
        few = [f"examples={16 if smoke else EXAMPLES}", f"draws={2 if smoke else DRAWS}"]
        report = json.loads(_flowtrain("eval", f"ckpt={run}", *few, "json=true"))
        summary = json.loads((Path(run) / "summary.json").read_text())
        count = 4 if smoke else SAMPLES
        _flowtrain("sample", f"ckpt={run}", f"n={count}", "devices=1", f"hydra.run.dir={folder}/samples")
        name = f"{data}_{model.lower().replace(', ', '_').replace(' ', '_').replace('+', 'p')}.png"
        shutil.copy(f"{folder}/samples/samples.png", grids / name)
        figures = {key: report.get(key) for key in FIGURES if report.get(key) is not None}
        return {
            **figures,
            "parameters": summary["parameters"],
            "steps": summary["steps"],
            "seconds_per_step": summary["seconds"] / summary["steps"],  # with its share of validations
            "sample_seconds": sampling_time(run, count),
            "grid": name,
        }


FIGURES = ("bits_per_dim", "bits_per_dim_stderr", "bits_per_dim_iw", "bits_per_dim_iw_stderr", "examples", "draws")


@torch.no_grad()
def sampling_time(run: str, count: int) -> float:
    """Seconds to draw ``count`` samples, the median of three times."""
    flow, times = flowtrain.load(run), []
    context = None if flow.context_shape is None else torch.zeros(count, *flow.context_shape)
    for _ in range(3):
        start = time.perf_counter()
        flow.sample(count, context)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tables(found: dict) -> str:
    """A table for each data set, the best likelihood first."""
    text = []
    for data, rows in found.items():
        if data == "machine":
            continue
        text += [f"**{data}**", "", "| " + " | ".join(HEAD) + " |", "| " + " | ".join(["---"] * len(HEAD)) + " |"]
        for model, row in sorted(rows.items(), key=lambda pair: pair[1]["bits_per_dim"]):
            iw = f"{row['bits_per_dim_iw']:.3f}" if "bits_per_dim_iw" in row else "–"
            cells = [
                model,
                f"{row['bits_per_dim']:.3f} ± {row['bits_per_dim_stderr']:.3f}",
                iw,
                f"{row['parameters']:,}",
                f"{row['minutes']:g}",
                f"{row['steps']:,}",
                f"{row['sample_seconds']:.2g}",
                f"[grid](frontier/{row['grid']})",
            ]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text).strip()


def draw(found: dict, path: Path) -> None:
    """bits/dim against the time of 64 samples, a panel for each data set."""
    panels = [data for data in found if data != "machine"]
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, data in zip(axes[0], panels):
        for model, row in found[data].items():
            axis.scatter(row["sample_seconds"], row["bits_per_dim"], s=30)
            place = row["sample_seconds"], row["bits_per_dim"]
            axis.annotate(model, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", xlabel="seconds for 64 samples", ylabel="test bits/dim", title=data)
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _flowtrain(*words: str) -> str:
    print("$ flowtrain", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "flowtrain", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


main()
