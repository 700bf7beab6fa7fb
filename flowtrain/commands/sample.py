"""``flowtrain sample``: a checkpoint's samples, as a grid of images or as a table, and the numbers themselves."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands import SampleConfig
from flowtrain.commands.contexts import Contexts, contexts
from flowtrain.commands.draws import sample_batches
from flowtrain.commands.outputs import open_array, open_table, progress, table_path
from flowtrain.commands.previews import POINTS, density_of
from flowtrain.commands.restored import Restored, restore
from flowtrain.data import Columns
from flowtrain.errors import UsageError
from flowtrain.plots.curves import plot_curves
from flowtrain.plots.grid import image_grid, save_png
from flowtrain.plots.pairs import ROWS, plot_pairs
from flowtrain.runtime import distributed

log = logging.getLogger("flowtrain")

IMAGES = 1024  # most images of a temperature in the grid


def main(config: SampleConfig, run_dir: str) -> dict:
    """Draw ``config.n`` samples, at each temperature, of each class of a list, for each row of a file of contexts;
    returns the files' paths.

    The samples are written into ``run_dir`` as they are drawn. Images and fields become samples.png. Vectors of an
    array, such as spectra, become curves.png with ``config.plot``. Rows of a table become samples.csv (or
    ``config.output``), in the columns and units of the data's file, and with ``config.plot`` pairs.png, and for two
    columns density.png too. All become samples.npy.
    """
    folder = Path(run_dir)
    restored = restore(config, config.ckpt, config.weights)
    spec = restored.dataset.spec
    if config.output and not restored.columns:
        raise UsageError(f"output={config.output}: only a table has rows to write; arrays become samples.npy")
    output = table_path(config.output, folder / "samples.csv")
    temperatures = config.temperature if isinstance(config.temperature, list) else [config.temperature]
    if not temperatures:
        raise UsageError("temperature=[]: give at least one, such as [0.5,0.7]")
    context = contexts(config, restored)
    n = config.n if context is None else len(context)
    batches = _batches(restored, n, config.seed, context, temperatures)
    if not distributed.is_main():
        for _ in batches:  # its share of the work
            pass
        return {}
    columns = restored.columns
    total, done, shown = n * len(temperatures), 0, []
    step = 1 if spec.is_image else math.ceil(total / ROWS)  # between the rows of a plot
    paths = {"npy": folder / "samples.npy"}
    with ExitStack() as stack:
        write = stack.enter_context(open_array(paths["npy"], total))
        if columns:
            paths["csv"] = output
            write_rows = stack.enter_context(open_table(output))
        bar = stack.enter_context(progress(total, "sample"))
        for first, samples in batches:
            write(samples.numpy())
            shown.append(samples[: max(0, IMAGES - first)] if spec.is_image else samples[-done % step :: step])
            if columns:
                write_rows(_table(columns, context, first, samples))
            done += len(samples)
            bar.update(len(samples))
    if spec.is_image:
        paths["png"] = folder / "samples.png"
        in_rows = isinstance(config.temperature, list) or isinstance(config.label, list)
        grid = image_grid(torch.cat(shown), spec.grey_levels, min(config.n, IMAGES) if in_rows else None)
        save_png(grid, paths["png"])
    elif config.plot:
        plot = _plots if columns else _plot_curves
        paths |= plot(restored, torch.cat(shown), folder)
    for path in paths.values():
        print(path)
    return {name: str(path) for name, path in paths.items()}


def _plot_curves(restored: Restored, samples: Tensor, folder: Path) -> dict[str, Path]:
    points, _ = _train_rows(restored)
    path = folder / "curves.png"
    title = f"{restored.dataset.spec.name}: data and samples"
    try:
        plot_curves(path, samples.numpy(), None if points is None else points.cpu().numpy(), title)
    except UsageError as error:
        log.info("without a plot: %s", error)
        return {}
    return {"curves": path}


def _batches(
    restored: Restored, n: int, seed: int, context: Contexts | None, temperatures: list[float]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the batches of all processes in order, at one temperature after the other: (the number of the first,
    samples)."""
    of = None if context is None else context.__getitem__
    for temperature in temperatures:
        place = distributed.rank(), distributed.world()
        mine = sample_batches(restored.flow, n, seed, of, temperature, *place)
        while turns := [turn for turn in distributed.all_gather_object(next(mine, None)) if turn is not None]:
            yield from turns


def _table(columns: Columns, context: Contexts | None, first: int, samples: Tensor) -> dict[str, np.ndarray]:
    """Samples as rows of a table. If their contexts come from a file, these come first, and their row (from 1) last."""
    table = columns.decode(samples)
    if context is None or not context.columns:
        return table
    places = context.places(slice(first, first + len(samples)))
    name = "row"
    while name in table or name in context.columns:
        name += "_"
    return {**{name: values[places] for name, values in context.columns.items()}, **table, name: places + 1}


def _plots(restored: Restored, samples: Tensor, folder: Path) -> dict[str, Path]:
    """Plot samples of a table beside its data."""
    points, context = _train_rows(restored)
    data = None if points is None else _matrix(restored.columns.to_plot(points))
    table, paths = restored.columns.to_plot(samples), {"pairs": folder / "pairs.png"}
    plot_pairs(paths["pairs"], _matrix(table), data, list(table), f"{restored.dataset.spec.name}: data and samples")
    if points is not None and restored.flow.dimensions <= 2 and not points.isnan().any():
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
