"""Images of densities over the plane and the line: data beside a model.

A density is a function ``log_prob`` from points (n, D), float32 on the CPU, to log-densities (n,) in nats. A model on
another device must move the points there itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtrain.plots.colours import shade

LogProb = Callable[[Tensor], Tensor]

GAP = 6  # pixels between two panels
WHITE, INK, PALE, STRONG = (255, 255, 255), (40, 40, 40), (170, 200, 215), (180, 30, 90)
LEAST_SIDE = 40  # fewest cells per side of a histogram of the plane


@dataclass(frozen=True)
class View:
    """What an image shows: the box from ``low`` to ``high``, and densities up to ``top``, which has the last
    colour."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    top: float


def density_image(log_prob: LogProb, data: Tensor, side: int = 400, cells: int | None = None) -> Tensor:
    """The density of the data and of the model in one image, (3, side, 2 side + 6) uint8.

    In the plane: a histogram of the data on the left, the model on the right. The data alone decide the box and the
    colours, so that images of one run can be compared. On the line: a histogram of the data in bars and the density of
    the model as a curve. Grey, or a gap in the curve, is where the model's density is NaN.

    Args:
        data: points (N, 1) or (N, 2); those that are not finite are left out.
        side: pixels per side of a panel.
        cells: evaluate the model on a grid of cells × cells; must divide ``side``. None: one cell per pixel.

    Raises:
        ValueError: data of another shape or without a finite point, or ``cells`` does not divide ``side``.
    """
    data = _finite_points(data)
    if data.shape[1] == 1:
        return _line_plot(log_prob, data[:, 0], side)
    view = choose_view(data)
    panels = [data_panel(data, view, side), model_panel(log_prob, view, side, cells)]
    gap = torch.full((3, side, GAP), 255, dtype=torch.uint8)
    return torch.cat((panels[0], gap, panels[1]), 2)


def choose_view(data: Tensor) -> View:
    """The view of points (N, 2): nearly all of them and a margin, with equal units on both axes unless one would be
    thin. ``top`` is about the density that 98 % of the points do not exceed."""
    data = _finite_points(data)
    low, high = _box(data)
    half, middle = (high - low) / 2, (high + low) / 2
    if half.max() < 4 * half.min():
        half = half.max().expand(2)
    low, high = middle - half, middle + half
    counts, area = _histogram(data, low, high, _count_bins(len(data), 400))
    of_points = counts.flatten().sort().values
    reached = of_points.cumsum(0) >= 0.98 * of_points.sum()
    count = of_points[reached][0]
    top = max(count - count.sqrt(), count / 2) / (len(data) * area)  # less the noise of a count
    return View(tuple(low.tolist()), tuple(high.tolist()), top.item())


def data_panel(data: Tensor, view: View, side: int = 400) -> Tensor:
    """A histogram of points (N, 2) as an image (3, side, side), uint8; fewer points give larger cells."""
    data = _finite_points(data)
    low, high = torch.tensor(view.low, dtype=data.dtype), torch.tensor(view.high, dtype=data.dtype)
    bins = _count_bins(len(data), side)
    counts, area = _histogram(data, low, high, bins)
    return _enlarge(shade(_to_rows_and_columns(counts / (len(data) * area * view.top))), side)


def model_panel(log_prob: LogProb, view: View, side: int = 400, cells: int | None = None, batch: int = 2**14) -> Tensor:
    """A density over the plane as an image (3, side, side), uint8, evaluated at the centres of cells × cells cells,
    ``batch`` points at a time. Raises ValueError if ``cells`` does not divide ``side``."""
    cells = cells or side
    if side % cells:
        raise ValueError(f"cells={cells} must divide side={side}")
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    x, y = (a + (b - a) * middles for a, b in zip(view.low, view.high))
    values = _evaluate(log_prob, torch.cartesian_prod(x, y), batch).view(cells, cells)
    return _enlarge(shade(_to_rows_and_columns(values / view.top)), side)


def sheet(panels: Sequence[Sequence[Tensor | None]], rows: Sequence[str], columns: Sequence[str]) -> Tensor:
    """Arrange panels of one size, (3, side, side) uint8, in one labelled image (3, H, W); None leaves a place empty.

    Raises:
        ValueError: the panels are not one for each pair of ``rows`` and ``columns``.
    """
    from PIL import Image, ImageDraw

    if len(panels) != len(rows) or any(len(row) != len(columns) for row in panels):
        raise ValueError(f"a sheet of {len(rows)} × {len(columns)} needs a panel, or None, for each place")
    side = next(panel.shape[-1] for row in panels for panel in row if panel is not None)
    font = _font(max(12, side // 11))
    left = math.ceil(max((font.getlength(row) for row in rows), default=0)) + 3 * GAP
    top = font.size + 3 * GAP
    image = Image.new("RGB", (left + len(columns) * (side + GAP), top + len(rows) * (side + GAP)), WHITE)
    draw = ImageDraw.Draw(image)
    for i, label in enumerate(columns):
        draw.text((left + i * (side + GAP) + side / 2, top / 2), label, INK, font, anchor="mm")
    for j, label in enumerate(rows):
        draw.text((left - 1.5 * GAP, top + j * (side + GAP) + side / 2), label, INK, font, anchor="rm")
        for i, panel in enumerate(panels[j]):
            if panel is not None:
                at = left + i * (side + GAP), top + j * (side + GAP)
                image.paste(Image.fromarray(panel.permute(1, 2, 0).contiguous().numpy()), at)
    return _to_tensor(image)


def _line_plot(log_prob: LogProb, data: Tensor, side: int) -> Tensor:
    """The data as bars and the model as a curve, (3, side, 2 side + 6) uint8."""
    from PIL import Image, ImageDraw

    fine = 3  # draw three times as large, then reduce: smooth edges
    width, height, base = (2 * side + GAP) * fine, side * fine, round(0.92 * side) * fine
    (low,), (high,) = (edge.tolist() for edge in _box(data[:, None]))
    bins = max(20, min(120, round(2 * len(data) ** (1 / 3))))
    counts = torch.histc(data, bins, low, high) * bins / ((high - low) * len(data))
    x = low + (high - low) * (torch.arange(width // fine, dtype=torch.float64) + 0.5) * fine / width
    curve = _evaluate(log_prob, x[:, None], 2**14)
    top = 1.1 * max(counts.max().item(), min(curve.nan_to_num(0, 0).max().item(), 2 * counts.max().item()))

    image = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(image)
    for i, value in enumerate(counts.tolist()):
        if value > 0:
            edges = (round(i * width / bins), base * (1 - value / top), round((i + 1) * width / bins) - fine, base)
            draw.rectangle(edges, PALE)
    draw.line((0, base, width, base), INK, fine)
    font = _font(max(12, side // 22) * fine)
    for tick in _ticks(low, high):
        at = (tick - low) / (high - low) * width
        draw.line((at, base, at, base + 4 * fine), INK, fine)
        draw.text((at, (base + height) / 2 + 2 * fine), f"{tick:g}", INK, font, anchor="mm")
    for (x0, y0), (x1, y1) in zip(*(list(enumerate(curve.tolist()))[i:] for i in (0, 1))):
        if math.isfinite(y0) and math.isfinite(y1):
            points = [((x + 0.5) * fine, max(base * (1 - y / top), -height)) for x, y in ((x0, y0), (x1, y1))]
            draw.line(points, STRONG, 2 * fine)
    return _to_tensor(image.resize((width // fine, side), Image.Resampling.BOX))


def _finite_points(data: Tensor) -> Tensor:
    data = data.detach().cpu().double()
    if data.dim() != 2 or data.shape[1] not in (1, 2):
        raise ValueError(f"data of shape {list(data.shape)}: a density plot needs points (N, 1) or (N, 2)")
    data = data[data.isfinite().all(1)]
    if not len(data):
        raise ValueError("data without a finite point")
    return data


def _box(data: Tensor) -> tuple[Tensor, Tensor]:
    """The box between two quantiles, so that a far point does not shrink all others, with a margin around it."""
    some = data[:: max(1, len(data) // 200_000)]
    low, high = some.quantile(0.002, 0), some.quantile(0.998, 0)
    margin = 0.15 * (high - low)
    margin[margin == 0] = 0.5  # all values are equal
    return low - margin, high + margin


def _count_bins(n: int, side: int) -> int:
    """The number of cells per side: the largest divisor of ``side`` that leaves a few points in a typical cell."""
    wanted = max(LEAST_SIDE, math.sqrt(n / 2))
    return max(bins for bins in range(1, side + 1) if side % bins == 0 and bins <= wanted)


def _histogram(data: Tensor, low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, float]:
    """Counts (bins, bins) by x and y, and the area of a cell."""
    at = ((data - low) / (high - low) * bins).floor().long()
    x, y = at[((at >= 0) & (at < bins)).all(1)].unbind(1)
    counts = torch.bincount(x * bins + y, minlength=bins * bins).view(bins, bins)
    return counts.double(), ((high - low) / bins).prod().item()


def _evaluate(log_prob: LogProb, points: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([log_prob(part).cpu().double() for part in points.float().split(batch)]).exp()


def _to_rows_and_columns(values: Tensor) -> Tensor:
    """Values by (x, y) with y upwards as values by (row, column) with rows downwards."""
    return values.T.flip(0)


def _enlarge(image: Tensor, side: int) -> Tensor:
    times = side // image.shape[-1]
    return image.repeat_interleave(times, -1).repeat_interleave(times, -2)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between ``low`` and ``high``, not close to either."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(m * step for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 8)
    inside = 0.03 * (high - low)
    numbers = range(math.ceil((low + inside) / step), math.floor((high - inside) / step) + 1)
    return [round(i * step, 12) for i in numbers]


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _to_tensor(image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
