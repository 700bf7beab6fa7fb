"""Plots of all pairs of a table's columns: data against samples of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from textwrap import wrap

import numpy as np

from flowtrain.errors import UsageError
from flowtrain.runtime import files

DATA, SAMPLES = "#33638d", "#d1495b"
FEW = 20  # whole numbers in a range smaller than this get one bin each
MOST_CATEGORIES = 12  # of more categories, the rarest share the last place
FONT_SIZE = 9
ROWS = 50_000  # most rows of a table to plot; more make no visible difference
POINTS = 2_000  # most rows to plot as dots


def plot_pairs(
    path: Path,
    samples,
    data=None,
    columns: Sequence[str] | None = None,
    title: str | None = None,
    most: int = 8,
) -> int:
    """Plot every pair of columns into the file ``path``: PNG, SVG or PDF by its suffix.

    The diagonal holds the histograms of each column, the data are below it and the samples above it: as dots if there
    are few rows, otherwise as a histogram. Each axis covers nearly all data.

    Args:
        samples, data: tables (n, D) of numbers, or of strings for categories. Without ``data`` the samples are below
            the diagonal and nothing is above it.
        columns: the D names.
        title: text above the plots, or None.
        most: plot only this many columns, the first ones.

    Returns:
        The number of columns that were left out; the plot says it too.

    Raises:
        UsageError: matplotlib is not installed.
        ValueError: a table is empty, or the numbers of columns differ.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a pair plot needs matplotlib: pip install 'flowtrain[plots]'") from error

    path = Path(path)
    tables = (
        {"samples": _to_table(samples)} if data is None else {"data": _to_table(data), "samples": _to_table(samples)}
    )
    width = tables["samples"].shape[1]
    names = [f"column {i + 1}" for i in range(width)] if columns is None else [str(name) for name in columns]
    for name, table in tables.items():
        if table.shape[1] != len(names):
            raise ValueError(f"{name} of {table.shape[1]} columns, names of {len(names)}")
    shown = min(width, most)
    axes = [Axis.from_columns(name, [table[:, i] for table in tables.values()]) for i, name in enumerate(names[:shown])]
    colours = {"data": DATA, "samples": SAMPLES}

    cell = {1: 4.0, 2: 2.7, 3: 2.4, 4: 2.1, 5: 1.9, 6: 1.75, 7: 1.6}.get(shown, 1.5)
    figure = Figure((shown * cell + 0.8, shown * cell + 1.0), dpi=120, layout="constrained", facecolor="white")
    grid = figure.subplots(shown, shown, squeeze=False)
    for row, down in enumerate(axes):
        for column, across in enumerate(axes):
            plot = grid[row, column]
            if row == column:
                _draw_histograms(plot, across, colours)
            elif column < row:
                _draw_points(plot, across, down, 0, colours[next(iter(tables))])
            elif data is not None:
                _draw_points(plot, across, down, 1, SAMPLES)
            else:
                plot.set_axis_off()
                continue
            _format_axes(plot, across, down, left=column == 0, bottom=row == shown - 1, diagonal=row == column)
            if row == shown - 1:
                plot.set_xlabel(_shorten(across.name, round(11 * cell)), fontsize=FONT_SIZE)
            if column == 0 and shown > 1:
                plot.set_ylabel(_shorten(down.name, round(11 * cell)), fontsize=FONT_SIZE)
    figure.align_xlabels(grid[-1])  # not of all plots: each would ask all others for their ticks
    figure.align_ylabels(grid[:, 0])
    _add_title_and_legend(figure, title, {name: colours[name] for name in tables})
    if shown < width:
        figure.supxlabel(
            f"the first {shown} of {width} columns", x=1, ha="right", fontsize=FONT_SIZE - 1, color="dimgrey"
        )
    _save(figure, path)
    return width - shown


@dataclass
class Axis:
    """One column: its values in each table as numbers, and the look of its axis."""

    name: str
    values: list[np.ndarray]
    edges: np.ndarray  # of the bins of its histogram
    discrete: bool = False
    ticks: list[float] | None = None
    words: list[str] = field(default_factory=list)  # at the ticks

    @classmethod
    def from_columns(cls, name: str, columns: list[np.ndarray]) -> Axis:
        try:
            values = [np.asarray(column, float) for column in columns]
        except (TypeError, ValueError):
            return cls._from_categories(name, columns)
        finite = [column[np.isfinite(column)] for column in values]
        if any(not len(column) for column in finite):
            raise ValueError(f"column {name} holds no finite number")
        first = finite[0]  # the data, or the samples without data
        if all((column == np.round(column)).all() for column in finite):
            low, high = first.min(), first.max()
            if high - low < FEW:
                edges = np.arange(low - 0.5, high + 1)
                ticks = None if high - low >= 6 else list(np.arange(low, high + 1))
                return cls(name, values, edges, True, ticks, [_format_number(tick) for tick in ticks or []])
        low, high = np.quantile(first, [0.002, 0.998])
        margin = 0.06 * (high - low) or 0.5
        low, high = max(low - margin, first.min() - margin / 2), min(high + margin, first.max() + margin / 2)
        bins = int(np.clip(2 * len(first) ** (1 / 3), 12, 50))
        if all((column == np.round(column)).all() for column in finite):
            step = math.ceil((high - low) / bins)  # the same number of whole numbers in each bin
            edges = np.arange(math.floor(low) - 0.5, high + step, step)
        else:
            edges = np.linspace(low, high, bins + 1)
        return cls(name, values, edges)

    @classmethod
    def _from_categories(cls, name: str, columns: list[np.ndarray]) -> Axis:
        texts = [column.astype(str) for column in columns]
        kinds, counts = np.unique(np.concatenate(texts), return_counts=True)
        kinds = kinds[np.argsort(-counts, kind="stable")]
        place = {kind: min(i, MOST_CATEGORIES - 1) for i, kind in enumerate(kinds)}
        values = [np.array([place[kind] for kind in text], float) for text in texts]
        words = [_shorten(kind, 12) for kind in kinds[:MOST_CATEGORIES]]
        if len(kinds) > MOST_CATEGORIES:
            words[-1] = "(others)"
        return cls(name, values, np.arange(len(words) + 1) - 0.5, True, list(range(len(words))), words)


def _to_table(rows) -> np.ndarray:
    table = np.asarray(rows)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"a table of shape {list(table.shape)} has no rows to plot")
    return table[:: max(1, len(table) // ROWS)]


def _draw_histograms(plot, axis: Axis, colours: dict[str, str]) -> None:
    """Histograms as shares of all rows, including those outside the axis."""
    order = list(colours) if len(axis.values) == 2 else ["samples"]
    for name, values in zip(order, axis.values):
        share = np.histogram(values, axis.edges)[0] / len(values)
        plot.stairs(share, axis.edges, fill=True, color=colours[name], alpha=0.35, linewidth=0)
        plot.stairs(share, axis.edges, color=colours[name], linewidth=1.2)
    plot.set_xlim(axis.edges[0], axis.edges[-1])
    plot.set_ylim(bottom=0)


def _draw_points(plot, across: Axis, down: Axis, which: int, colour: str) -> None:
    """Plot two columns of one table: of ``which`` table, 0 or 1."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    x, y = across.values[which], down.values[which]
    if len(x) <= POINTS and not (across.discrete or down.discrete):
        size = 16 * min(1.0, 100 / len(x)) + 1.5
        plot.scatter(x, y, s=size, color=colour, alpha=0.5, linewidths=0, rasterized=True)
    else:
        counts = np.histogram2d(x, y, [across.edges, down.edges])[0]
        shades = LinearSegmentedColormap.from_list("", ["white", colour, "black"])
        norm = PowerNorm(0.5, 0, max(1.3 * counts.max(), 1))
        plot.pcolormesh(across.edges, down.edges, counts.T, cmap=shades, norm=norm, rasterized=True)
    plot.set_xlim(across.edges[0], across.edges[-1])
    plot.set_ylim(down.edges[0], down.edges[-1])


def _format_axes(plot, across: Axis, down: Axis, left: bool, bottom: bool, diagonal: bool) -> None:
    """Ticks are at the left and the lower edge alone: to lay out those of 64 plots takes seconds."""
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    plot.tick_params(labelsize=FONT_SIZE - 2, length=2.5, pad=2)
    if bottom:
        _ticks(plot.xaxis, across)
    else:
        plot.set_xticks([])
    if left and not diagonal:
        _ticks(plot.yaxis, down)
    else:
        plot.set_yticks([])
    plot.spines["left"].set_visible(not diagonal)


def _ticks(axis, column: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if column.ticks is None:
        span = column.edges[-1] - column.edges[0]
        digits = max(6, 3 + math.ceil(math.log10(abs(column.edges).max() / span)))  # enough for labels to differ
        locator = MaxNLocator(4 if digits == 6 else 2, steps=[1, 2, 5, 10], integer=column.discrete)
        axis.set_major_locator(locator)
        rounded = FuncFormatter(lambda value, _: _format_number(value if abs(value) > 1e-9 * span else 0, digits))
        axis.set_major_formatter(rounded)
    else:
        axis.set_ticks(column.ticks, column.words)
        if axis.axis_name == "x" and max(map(len, column.words)) > 2:
            axis.set_tick_params(rotation=90)


def _add_title_and_legend(figure, title: str | None, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    if title:
        room = 10 * (figure.get_figwidth() - 2)  # characters that fit beside the legend
        figure.suptitle("\n".join(wrap(title, round(room))), x=0.01, ha="left", fontsize=FONT_SIZE + 2)
    patches = [Patch(color=colour, alpha=0.6, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=2, fontsize=FONT_SIZE, frameon=False)


def _save(figure, path: Path) -> None:
    """Write the figure; ``path`` never holds a partial file."""
    data = BytesIO()
    figure.savefig(data, format=path.suffix[1:] or "png")
    files.write(path, data.getvalue())


def _format_number(value: float, digits: int = 6) -> str:
    """A short text of a number: 1500000 becomes 1.5e6."""
    return f"{value:.{digits}g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
