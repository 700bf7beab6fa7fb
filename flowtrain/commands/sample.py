"""``flowtrain sample``: a checkpoint's samples, as a grid of images or as a table, and the numbers themselves."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands.contexts import contexts
from flowtrain.commands.data import columns_of, is_image, open_as
from flowtrain.commands.draws import drawn
from flowtrain.commands.previews import POINTS, density_of
from flowtrain.config.build import build_flow
from flowtrain.data import Columns
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.plots.grid import image_grid, save_png
from flowtrain.plots.pairs import plot_pairs
from flowtrain.runtime import checkpoint, distributed
from flowtrain.runtime.checkpoint import load_weights

log = logging.getLogger("flowtrain")


def main(cfg, run_dir: str) -> dict:
    """Draw ``cfg.n`` samples at each temperature and write them into ``run_dir``; returns the files' paths.

    Images become samples.png. Rows become samples.csv, in the columns and units of the data's file, and with
    ``cfg.plot`` pairs.png, of two columns density.png too. All become samples.npy.
    """
    flow = build_flow(cfg, distributed.device())
    state = checkpoint.read(cfg.ckpt)
    load_weights(flow, state, cfg.weights)
    columns = columns_of(state)
    rows = not isinstance(cfg.temperature, float)
    temperatures = list(cfg.temperature) if rows else [cfg.temperature]
    if not temperatures:
        raise UsageError("temperature=[]: give at least one, such as [0.5,0.7]")
    context = contexts(cfg, flow, columns)
    if not distributed.is_main():
        return {}
    samples = torch.cat([drawn(flow, cfg.n, cfg.seed, context, t) for t in temperatures])
    folder = Path(run_dir)
    paths = {"npy": folder / "samples.npy"}
    np.save(paths["npy"], samples.numpy())
    if is_image(cfg):
        paths["png"] = folder / "samples.png"
        save_png(image_grid(samples, cfg.dataset.levels, cfg.n if rows else None), paths["png"])
    else:
        paths |= _write_rows(flow, samples, columns or Columns.from_rows(samples.numpy()), cfg, folder)
    for path in paths.values():
        print(path)
    return {name: str(path) for name, path in paths.items()}


def _write_rows(flow: Flow, samples: Tensor, columns: Columns, cfg, folder: Path) -> dict[str, Path]:
    paths = {"csv": folder / "samples.csv"}
    table = columns.decode(samples)
    with paths["csv"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(values.tolist() for values in table.values())))
    if not cfg.plot:
        return paths
    points, context = _data(columns, cfg, next(flow.parameters()).device)
    data = None if points is None else _matrix(columns.decode(points))
    paths["pairs"] = folder / "pairs.png"
    plot_pairs(paths["pairs"], _matrix(table), data, columns.names, f"{cfg.dataset.name}: data and samples")
    if points is not None and flow.dimensions <= 2:
        paths["density"] = folder / "density.png"
        save_png(density_of(flow, points, context), paths["density"])
    return paths


def _data(columns: Columns, cfg, device) -> tuple[Tensor | None, Tensor | None]:
    """Rows of the train split and their context, where the data are at hand."""
    try:
        split = open_as(columns, cfg).split("train").to(device)
    except UsageError as error:
        log.info("the plot is of the samples alone: %s", error)
        return None, None
    return split.take(torch.arange(min(POINTS, len(split))))


def _matrix(table: dict) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=object) for values in table.values()], 1)
