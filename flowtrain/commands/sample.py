"""``flowtrain sample``: a checkpoint's samples, as a grid of images or as a table, and the numbers themselves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.decoding import guidance, jacobi
from flowtrain.commands import SampleConfig
from flowtrain.commands.contexts import Contexts, contexts
from flowtrain.commands.decoding import check_decoding
from flowtrain.commands.draws import sample_batches
from flowtrain.commands.metropolis import Metropolis, log_weights
from flowtrain.commands.outputs import free_name, open_array, open_table, progress, table_path
from flowtrain.commands.previews import POINTS, density_of
from flowtrain.commands.restored import Restored, restore
from flowtrain.data import Columns
from flowtrain.engine.out_of_memory import more_memory, out_of_memory
from flowtrain.errors import UsageError
from flowtrain.plots.curves import plot_curves
from flowtrain.plots.grid import image_grid, labelled_rows, save_png
from flowtrain.plots.pairs import ROWS, plot_pairs
from flowtrain.runtime import distributed

log = logging.getLogger("flowtrain")

IMAGES, ROW = 1024, 64  # most images in the grid, and in a row of a class or temperature


def main(config: SampleConfig, run_dir: str) -> dict:
    """Draw samples as ``config.decoding`` and ``config.guidance`` say; see :func:`draw`."""
    with ExitStack() as stack:
        inverses = stack.enter_context(jacobi()) if config.decoding == "jacobi" else None
        stack.enter_context(guidance(config.guidance))
        paths = draw(config, run_dir)
    if inverses:
        log.info("Jacobi iteration: %s", inverses)
    return paths


def draw(config: SampleConfig, run_dir: str) -> dict:
    """Draw ``config.n`` samples, at each temperature, of each class of a list, for each row of a file of contexts;
    returns the files' paths.

    The samples are written into ``run_dir`` as they are drawn, at one temperature after the other. Images and fields
    become samples.png; lists of classes or temperatures have a row for each class at each temperature. Vectors of an
    array, such as spectra, become curves.png with ``config.plot``. Rows of a table become samples.csv (or
    ``config.output``), in the columns and units of the data's file, and with ``config.plot`` pairs.png, and for two
    columns density.png too. All become samples.npy. With ``config.weights`` true, log_weights.npy and a column of the
    table hold the logarithms of importance weights; with ``config.mcmc`` the samples are states of Metropolis chains.
    """
    folder = Path(run_dir)
    restored = restore(config, config.ckpt, "auto" if isinstance(config.weights, bool) else config.weights)
    spec = restored.dataset.spec
    if config.output and not restored.columns:
        raise UsageError(f"output={config.output}: only a table has rows to write; arrays become samples.npy")
    output = table_path(config.output, folder / "samples.csv")
    temperatures = config.temperature if isinstance(config.temperature, list) else [config.temperature]
    if not temperatures:
        raise UsageError("temperature=[]: give at least one, such as [0.5,0.7]")
    context = contexts(config, restored)
    weighs = _weighs(config, spec.target)
    check_decoding(config, restored.flow)
    chains = Metropolis(config.seed) if config.mcmc else None
    n = chains.proposals(config.n) if chains else config.n
    turns = _turns(n, config, context, temperatures)
    batches = _batches(restored, turns, config, partial(log_weights, restored.flow, spec.target) if weighs else None)
    if not distributed.is_main():
        for _ in batches:  # its share of the work
            pass
        return {}
    columns = restored.columns
    if chains:
        batches = _states(batches, config.n, chains)
    total, done = config.n if chains else sum(turn.n for turn in turns), 0
    shown: list[list[Tensor]] = [[] for _ in turns]
    in_rows = isinstance(config.temperature, list) or bool(context and context.classes)
    most = ROW if in_rows else IMAGES  # images of a turn in the grid
    step = math.ceil(total / ROWS)  # between the rows of a plot
    paths = {"npy": folder / "samples.npy"}
    with ExitStack() as stack:
        write = stack.enter_context(open_array(paths["npy"], total))
        if weights_are_written := weighs and not chains:
            paths["log_weights"] = folder / "log_weights.npy"
            write_weights = stack.enter_context(open_array(paths["log_weights"], total))
        if columns:
            paths["csv"] = output
            write_rows = stack.enter_context(open_table(output))
        bar = stack.enter_context(progress(total, "sample"))
        for number, first, samples, log_w in batches:
            write(samples.numpy())
            if weights_are_written:
                write_weights(log_w.numpy())
            shown[number].append(samples[: max(0, most - first)] if spec.is_image else samples[-done % step :: step])
            if columns:
                table = _table(columns, context, first, samples)
                if weights_are_written:
                    table[free_name("log_weight", table)] = log_w.numpy()
                write_rows(table)
            done += len(samples)
            bar.update(len(samples))
    if spec.is_image:
        paths["png"] = folder / "samples.png"
        images = [torch.cat(parts) for parts in shown]
        if in_rows:
            grid = _grid_of_rows(turns, images, len(temperatures), spec.grey_levels)
        else:
            grid = image_grid(images[0], spec.grey_levels)
        save_png(grid, paths["png"])
    elif config.plot:
        plot = _plots if columns else _plot_curves
        paths |= plot(restored, torch.cat([part for parts in shown for part in parts]), folder)
    for path in paths.values():
        print(path)
    if chains:
        log.info("independence Metropolis: %.1f %% of the proposals were accepted", 100 * chains.acceptance)
    return {name: str(path) for name, path in paths.items()}


def _weighs(config: SampleConfig, target) -> bool:
    """Whether samples need importance weights. Raises UsageError where they cannot have any."""
    words = [word for word, wanted in (("weights=true", config.weights is True), ("mcmc=true", config.mcmc)) if wanted]
    if not words:
        return False
    if target is None:
        raise UsageError(f"{words[0]}: only a run that learned from a target, target=NAME, has importance weights")
    if len(words) == 2:
        raise UsageError("weights=true: the states of mcmc=true all have the same weight; choose one")
    if config.temperature != 1:
        raise UsageError(f"{words[0]}: the density of samples is known at temperature=1.0 alone")
    return True


def _states(batches, n: int, chains: Metropolis):
    """n states of Metropolis chains, in batches as their proposals come."""
    first, rest = 0, None
    for number, _, samples, log_w in batches:
        if rest is not None:
            samples, log_w = torch.cat([rest[0], samples]), torch.cat([rest[1], log_w])
        whole = len(samples) // chains.chains * chains.chains
        rest = samples[whole:], log_w[whole:]
        states = chains.feed(samples[:whole], log_w[:whole])[: n - first]
        if len(states):
            yield number, first, states, None
        first += len(states)


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


@dataclass(frozen=True)
class Turn:
    """n samples at one temperature, and of a list of classes of one class; ``labels`` name them in the grid."""

    n: int
    temperature: float
    context: Contexts | None
    labels: tuple[str, str]


def _turns(n: int, config: SampleConfig, context: Contexts | None, temperatures: list[float]) -> list[Turn]:
    """The turns in the order of samples.npy: all classes at a temperature, then at the next."""
    contexts = [None] if context is None else context.turns()
    classes = (context and context.classes) or [""] * len(contexts)
    listed = isinstance(config.temperature, list)
    return [
        Turn(n if of is None else len(of), temperature, of, (name, f"T = {temperature}" if listed else ""))
        for temperature in temperatures
        for of, name in zip(contexts, classes, strict=True)
    ]


def _batches(
    restored: Restored, turns: list[Turn], config: SampleConfig, weigh: Callable[[Tensor], Tensor] | None
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """Yield the batches of all processes in order: (number of the turn, number of the first sample in it, samples, what
    ``weigh`` returns for them)."""
    for number, turn in enumerate(turns):
        of = None if turn.context is None else turn.context.__getitem__
        place = distributed.rank(), distributed.world()
        mine = sample_batches(restored.flow, turn.n, config.seed, of, turn.temperature, *place, config.denoise)
        parts = ((first, samples, weigh and weigh(samples)) for first, samples in mine)
        while drawn := [part for part in distributed.all_gather_object(_next(parts, turn.n)) if part is not None]:
            yield from ((number, *part) for part in drawn)


def _next(batches: Iterator[tuple], n: int) -> tuple | None:
    device = distributed.device()
    with out_of_memory(
        device, f"{n} samples, a batch at a time", f"a smaller n would need less; {more_memory(device)}"
    ):
        return next(batches, None)


def _grid_of_rows(turns: list[Turn], images: list[Tensor], temperatures: int, grey_levels: int | None) -> Tensor:
    """A row for each turn, the temperatures of a class below each other."""
    classes, most = len(turns) // temperatures, max(1, IMAGES // len(images[0]))
    rows = [place * classes + number for number in range(classes) for place in range(temperatures)]
    if len(rows) > most:
        log.info("the grid shows the first %d of %d rows; samples.npy has all", most, len(rows))
    labels = [", ".join(filter(None, turns[number].labels)) for number in rows[:most]]
    return labelled_rows(torch.cat([images[number] for number in rows[:most]]), grey_levels, labels)


def _table(columns: Columns, context: Contexts | None, first: int, samples: Tensor) -> dict[str, np.ndarray]:
    """Samples as rows of a table. If their contexts come from a file, these come first, and their row (from 1) last."""
    table = columns.decode(samples)
    if context is None or not context.columns:
        return table
    places = context.places(slice(first, first + len(samples)))
    name = free_name("row", {*table, *context.columns})
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
    """Rows of the train split and their context; None where there are none to show."""
    try:
        split = restored.split("train").to(next(restored.flow.parameters()).device)
    except UsageError as error:
        log.info("the plot shows the samples alone: %s", error)
        return None, None
    return split.shown(POINTS)


def _matrix(table: dict) -> np.ndarray:
    return np.stack([np.asarray(values, dtype=object) for values in table.values()], 1)
