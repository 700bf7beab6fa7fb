"""Plots of examples that are curves, such as spectra: data against samples of a model."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np

from flowtrain.errors import UsageError
from flowtrain.plots.pairs import DATA, SAMPLES
from flowtrain.runtime import files

CURVES = 24  # of each kind, drawn one over another


def plot_curves(path: Path, samples: np.ndarray, data: np.ndarray | None = None, title: str | None = None) -> None:
    """Plot some rows (n, L) as curves into a PNG: the data above, the samples below on the same axes.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a plot of curves needs matplotlib: pip install 'flowtrain[plots]'") from error

    panels = {"samples": (samples, SAMPLES)} if data is None else {"data": (data, DATA), "samples": (samples, SAMPLES)}
    figure = Figure((8, 1 + 2.6 * len(panels)), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for plot, (name, (rows, colour)) in zip(axes, panels.items()):
        plot.plot(rows[:CURVES].T, color=colour, linewidth=0.8, alpha=0.6)
        plot.set_title(f"{min(CURVES, len(rows))} of the {name}", fontsize=9, loc="left")
        plot.tick_params(labelsize=8)
    if title is not None:
        figure.suptitle(title, fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    files.write(path, buffer.getvalue())
