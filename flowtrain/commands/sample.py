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
from flowtrain.commands.draws import draw_samples
from flowtrain.commands.previews import POINTS, density_of
from flowtrain.commands.restored import Restored, restore
from flowtrain.data import Columns
from flowtrain.errors import UsageError
from flowtrain.plots.grid import image_grid, save_png
from flowtrain.plots.pairs import plot_pairs
from flowtrain.runtime import distributed

log = logging.getLogger("flowtrain")


def main(config: SampleConfig, run_dir: str) -> dict:
    """Draw ``config.n`` samples, of each class of a list and at each temperature, and write them into ``run_dir``;
    returns the files' paths.

    Images become samples.png. Rows become samples.csv, in the columns and units of the data's file, and with
    ``config.plot`` pairs.png, and for two columns density.png too. All become samples.npy.
    """
    restored = restore(config, config.ckpt, config.weights)
    flow, columns, spec = restored.flow, restored.columns, restored.dataset.spec
    rows = isinstance(config.temperature, list) or isinstance(config.label, list)  # of the grid, n samples wide
    temperatures = config.temperature if isinstance(config.temperature, list) else [config.temperature]
    if not temperatures:
        raise UsageError("temperature=[]: give at least one, such as [0.5,0.7]")
    context = contexts(config, flow, columns)
    if not distributed.is_main():
        return {}
    count = config.n if context is None else len(context)
    samples = torch.cat([draw_samples(flow, count, config.seed, context, t) for t in temperatures])
    folder = Path(run_dir)
    paths = {"npy": folder / "samples.npy"}
    np.save(paths["npy"], samples.numpy())
    if spec.is_image:
        paths["png"] = folder / "samples.png"
        save_png(image_grid(samples, spec.grey_levels, config.n if rows else None), paths["png"])
    else:
        paths |= _write_rows(restored, samples, folder, config.plot)
    for path in paths.values():
        print(path)
    return {name: str(path) for name, path in paths.items()}


def _write_rows(restored: Restored, samples: Tensor, folder: Path, plot: bool) -> dict[str, Path]:
    paths = {"csv": folder / "samples.csv"}
    columns = restored.columns or Columns.from_rows(samples.numpy())
    table = columns.decode(samples)
    with paths["csv"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(values.tolist() for values in table.values())))
    if not plot:
        return paths
    points, context = _train_rows(restored)
    data = None if points is None else _matrix(columns.decode(points))
    paths["pairs"] = folder / "pairs.png"
    plot_pairs(paths["pairs"], _matrix(table), data, columns.names, f"{restored.dataset.spec.name}: data and samples")
    if points is not None and restored.flow.dimensions <= 2:
        paths["density"] = folder / "density.png"
        save_png(density_of(restored.flow, points, context), paths["density"])
    return paths


def _train_rows(restored: Restored) -> tuple[Tensor | None, Tensor | None]:
    """Rows of the train split and their context; None where the data are not there."""
    try:
        split = restored.split("train").to(next(restored.flow.parameters()).device)
    except UsageError as error:
        log.info("the plot shows the samples alone: %s", error)
        return None, None
    return split.take(torch.arange(min(POINTS, len(split))))


def _matrix(table: dict) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=object) for values in table.values()], 1)
