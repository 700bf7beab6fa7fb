"""The calibration of a posterior: ranks of each parameter, and coverage against level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np

from flowtrain.errors import UsageError
from flowtrain.plots.pairs import DATA, SAMPLES
from flowtrain.runtime import files

BINS, MOST, WIDE = 20, 16, 4


def plot_calibration(
    path: Path,
    ranks: Mapping[str, np.ndarray],
    curves: Mapping[str, np.ndarray],
    levels: np.ndarray,
    band: tuple[np.ndarray, np.ndarray],
    bin_band: tuple[float, float],
    title: str,
) -> None:
    """Plot a histogram of the ranks of each parameter, (N,) in [0, 1], and curves over ``levels``, with the grey bands
    in which they would lie, into the file ``path``: PNG or SVG by its suffix.

    Args:
        band: of the curves, around the diagonal.
        bin_band: of the share of ranks in each of ``BINS`` bins.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a plot of calibration needs matplotlib: pip install 'flowtrain[plots]'") from error
    shown = dict([*ranks.items()][:MOST])
    count = len(shown) + len(curves)
    wide = min(WIDE, count)
    tall = math.ceil(count / wide)
    figure = Figure((3.2 * wide, 0.5 + 2.7 * tall), dpi=120, layout="constrained", facecolor="white")
    panels = iter(figure.subplots(tall, wide, squeeze=False).flat)
    for name, plot in zip(shown, panels):
        plot.axhspan(*bin_band, color="0.85", linewidth=0)
        weights = np.full(len(ranks[name]), 1 / len(ranks[name]))
        plot.hist(ranks[name], BINS, range=(0, 1), weights=weights, histtype="stepfilled", color=DATA, alpha=0.7)
        plot.set(xlim=(0, 1), xlabel=f"rank of {name}", ylim=(0, None))
    for (name, found), plot in zip(curves.items(), panels):
        plot.fill_between(levels, *band, color="0.85", linewidth=0)
        plot.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        plot.plot(levels, found, color=SAMPLES, linewidth=1.5)
        plot.set(xlim=(0, 1), ylim=(0, 1), xlabel="level", title=name)
        plot.title.set_fontsize(9)
    for plot in figure.axes:
        plot.tick_params(labelsize=8)
        plot.xaxis.label.set_fontsize(9)
    for plot in panels:
        plot.set_visible(False)
    figure.suptitle(title, fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:])
    files.write(path, buffer.getvalue())
