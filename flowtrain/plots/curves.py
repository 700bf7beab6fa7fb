"""Plots of examples that are curves, such as spectra: data against samples of a model."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from flowtrain.errors import UsageError
from flowtrain.plots.colours import shade
from flowtrain.plots.pairs import DATA, SAMPLES
from flowtrain.runtime import files

CURVES = 24  # of each kind, drawn one over another
PANELS = 8  # of paths


def plot_curves(path: Path, samples: np.ndarray, data: np.ndarray | None = None, title: str | None = None) -> None:
    """Plot some rows (n, L) as curves into a PNG: the data above, the samples below on the same axes.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure_class = _figure_class()
    panels = {"samples": (samples, SAMPLES)} if data is None else {"data": (data, DATA), "samples": (samples, SAMPLES)}
    figure = figure_class((8, 1 + 2.6 * len(panels)), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for plot, (name, (rows, colour)) in zip(axes, panels.items()):
        plot.plot(rows[:CURVES].T, color=colour, linewidth=0.8, alpha=0.6)
        plot.set_title(f"{min(CURVES, len(rows))} of the {name}", fontsize=9, loc="left")
        plot.tick_params(labelsize=8)
    if title is not None:
        figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_paths(path: Path, rows: np.ndarray, labels: Sequence[str]) -> None:
    """Plot the curves of paths (n, steps, L), a panel for each of the first, from dark to light, into a PNG.

    Raises:
        UsageError: matplotlib is not installed.
    """
    shown = rows[:PANELS]
    figure = _figure_class()((8, 0.6 + 1.6 * len(shown)), dpi=120, layout="constrained", facecolor="white")
    colours = shade(torch.linspace(0, 0.9, rows.shape[1])).T.double().numpy() / 255
    for plot, curves, label in zip(figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0], shown, labels):
        for curve, colour in zip(curves, colours):
            plot.plot(curve, color=colour, linewidth=1)
        plot.set_title(label, fontsize=9, loc="left")
        plot.tick_params(labelsize=8)
    _save(figure, path)


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a plot of curves needs matplotlib: pip install 'flowtrain[plots]'") from error
    return Figure


def _save(figure, path: Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    files.write(path, buffer.getvalue())
