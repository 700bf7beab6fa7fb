"""A sweep: its figure against each key that was swept."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FixedLocator, FuncFormatter, LogLocator, NullLocator

from flowtrain.plots.pairs import DATA, SAMPLES
from flowtrain.runtime import files

FEW = 6  # values that are ticks themselves
WIDE = 20  # positive numbers whose greatest is this many times the least get a logarithmic axis


def plot_sweep(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    values: Sequence[float],
    errors: Sequence[float | None],
    name: str,
    least_is_best: bool,
    log_keys: Collection[str] = (),
) -> None:
    """Plot a PNG with a panel for each key: the ``values`` of the jobs against the key's ``columns``.

    Numbers are points, with a line through their means where several jobs share them; other values are strips. The best
    job is marked in each panel. ``errors`` are standard errors, ``log_keys`` the keys with a logarithmic axis.
    """
    wide = min(3, len(columns))
    rows = math.ceil(len(columns) / wide)
    figure = Figure((4.2 * wide, 3.4 * rows), dpi=120, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, wide, squeeze=False, sharey=True)
    best = (min if least_is_best else max)(range(len(values)), key=values.__getitem__)
    for at, (plot, (key, cells)) in enumerate(zip(panels.flat, columns.items())):
        places = _numbers(cells)
        numeric = places is not None
        if not numeric:
            names = sorted({*cells})
            places = [names.index(cell) + _shift(i, cells) for i, cell in enumerate(cells)]
            plot.set_xticks(range(len(names)), [_shorten(one) for one in names], rotation=30 * (len(names) > 4))
            plot.set_xlim(-0.5, len(names) - 0.5)
        else:
            _scale(plot, places, min(places) > 0 and (key in log_keys or max(places) > WIDE * min(places)))
        bars = [0.0 if error is None else error for error in errors]
        plot.errorbar(places, values, bars, fmt="o", color=DATA, markersize=4, elinewidth=1, zorder=2)
        if numeric and len({*places}) < len(places):
            shared = sorted({*places})
            means = [_mean([value for place, value in zip(places, values) if place == one]) for one in shared]
            plot.plot(shared, means, color=DATA, linewidth=1, alpha=0.5, zorder=1)
        plot.plot(places[best], values[best], "*", color=SAMPLES, markersize=13, zorder=3)
        plot.set_xlabel(key, fontsize=9)
        plot.tick_params(labelsize=8)
        plot.ticklabel_format(axis="y", useOffset=False)
        if at % wide == 0:
            plot.set_ylabel(name.replace("_", " "), fontsize=9)
    for plot in panels.flat[len(columns) :]:
        plot.set_visible(False)
    figure.suptitle(f"{len(values)} jobs; ★ the best: {values[best]:.4f}", fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    files.write(path, buffer.getvalue())


def _scale(plot, places: Sequence[float], is_log: bool) -> None:
    """Scale the axis of numbers: ticks at the values themselves where there are few."""
    plot.set_xscale("log" if is_log else "linear")
    few = sorted({*places})
    locator = FixedLocator(few) if len(few) <= FEW else LogLocator(subs=(1, 2, 5)) if is_log else AutoLocator()
    plot.xaxis.set_major_locator(locator)
    plot.xaxis.set_minor_locator(NullLocator())
    plot.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))


def _numbers(cells: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _shift(i: int, cells: Sequence[str]) -> float:
    """Beside each other the jobs with the same value."""
    same = [j for j, cell in enumerate(cells) if cell == cells[i]]
    return (same.index(i) - (len(same) - 1) / 2) * 0.5 / len(same)


def _shorten(text: str) -> str:
    return text if len(text) <= 18 else text[:17] + "…"


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
