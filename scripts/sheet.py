"""Draw the densities of a sweep over models and two-dimensional data sets as docs/toys.png.

scripts/sheet SWEEP MODELS TOYS      names separated by commas
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch

import flowtrain
from flowtrain.bijections.ode import exact_trace
from flowtrain.config.build import build
from flowtrain.config.restore import checkpoint_config
from flowtrain.plots.density import choose_view, data_panel, model_panel, sheet
from flowtrain.plots.grid import save_png

SIDE = 160
sweep, models, toys = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
with (sweep / "results.csv").open() as file:
    runs = {tuple(row["overrides"].split()[:2]): row for row in csv.DictReader(file) if row["status"] == "finished"}


def load_data(toy: str) -> torch.Tensor:
    """Training examples of a data set of the sweep: (N, 2)."""
    row = next(row for (_, name), row in runs.items() if name == f"dataset={toy}")
    config = checkpoint_config(Path(row["run_dir"]) / "checkpoints" / "best.pt")
    return build(config.dataset, "dataset").split("train").data[:30_000]


points = {toy: load_data(toy) for toy in toys}
views = {toy: choose_view(points[toy]) for toy in toys}
rows = [[data_panel(points[toy], views[toy], SIDE) for toy in toys]]
for model in models:
    rows.append([])
    for toy in toys:
        run = runs.get((f"model={model}", f"dataset={toy}"))
        panel = None
        if run:
            flow = flowtrain.load(run["run_dir"])
            with torch.no_grad(), exact_trace():
                panel = model_panel(flow, views[toy], SIDE)
        rows[-1].append(panel)
save_png(sheet(rows, ["data", *models], toys), Path("docs/toys.png"))
print("docs/toys.png")
