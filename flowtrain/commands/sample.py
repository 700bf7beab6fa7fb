"""``flowtrain sample``: a checkpoint's samples, as a grid of images or as a table, and the numbers themselves."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands import SampleConfig
from flowtrain.commands.contexts import contexts
from flowtrain.commands.data import columns_of, is_image, open_dataset
from flowtrain.commands.draws import draw_samples
from flowtrain.commands.previews import POINTS, density_of
from flowtrain.config.build import build_flow
from flowtrain.data import Columns
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.plots.grid import grid, save_png
from flowtrain.plots.pairs import pairs
from flowtrain.runtime import checkpoint, distributed
from flowtrain.runtime.checkpoint import load_weights

log = logging.getLogger("flowtrain")


def main(config: SampleConfig, run_dir: str) -> dict:
    """Draw ``config.n`` samples at each temperature and write them into ``run_dir``; returns the files' paths.

    Images become samples.png. Rows become samples.csv, in the columns and units of the data's file, and with
    ``config.plot`` pairs.png, and for two columns density.png too. All become samples.npy.
    """
    flow = build_flow(config, distributed.device())
    state = checkpoint.read(config.ckpt)
    load_weights(flow, state, config.weights)
    columns = columns_of(state)
    rows = not isinstance(config.temperature, float)
    temperatures = list(config.temperature) if rows else [config.temperature]
    if not temperatures:
        raise UsageError("temperature=[]: give at least one, such as [0.5,0.7]")
    context = contexts(config, flow, columns)
    if not distributed.is_main():
        return {}
    samples = torch.cat([draw_samples(flow, config.n, config.seed, context, t) for t in temperatures])
    folder = Path(run_dir)
    paths = {"npy": folder / "samples.npy"}
    np.save(paths["npy"], samples.numpy())
    if is_image(config):
        paths["png"] = folder / "samples.png"
        save_png(grid(samples, config.dataset["levels"], config.n if rows else None), paths["png"])
    else:
        paths |= _write_rows(flow, samples, columns or Columns.of(samples.numpy()), config, folder)
    for path in paths.values():
        print(path)
    return {name: str(path) for name, path in paths.items()}


def _write_rows(flow: Flow, samples: Tensor, columns: Columns, config: SampleConfig, folder: Path) -> dict[str, Path]:
    paths = {"csv": folder / "samples.csv"}
    table = columns.decode(samples)
    with paths["csv"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(values.tolist() for values in table.values())))
    if not config.plot:
        return paths
    points, context = _train_rows(columns, config, next(flow.parameters()).device)
    data = None if points is None else _matrix(columns.decode(points))
    paths["pairs"] = folder / "pairs.png"
    pairs(paths["pairs"], _matrix(table), data, columns.names, f"{config.dataset['name']}: data and samples")
    if points is not None and flow.dimensions <= 2:
        paths["density"] = folder / "density.png"
        save_png(density_of(flow, points, context), paths["density"])
    return paths


def _train_rows(columns: Columns, config: SampleConfig, device) -> tuple[Tensor | None, Tensor | None]:
    """Rows of the train split and their context; None where the data are not there."""
    try:
        split = open_dataset(columns, config).split("train").to(device)
    except UsageError as error:
        log.info("the plot shows the samples alone: %s", error)
        return None, None
    return split.take(torch.arange(min(POINTS, len(split))))


def _matrix(table: dict) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=object) for values in table.values()], 1)
