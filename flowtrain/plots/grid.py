"""Grids of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.plots.colours import shade
from flowtrain.runtime import files

DARK = 64  # of 255
TEXT = 18  # pixels of the lowest row with a label


def image_grid(images: Tensor, grey_levels: int | None, columns: int | None = None, side: int = 512) -> Tensor:
    """Arrange images (n, C, H, W) in one image (3, height, width), uint8: integers of ``grey_levels`` grey levels, or a
    field of real numbers (None), in colours that span nearly all of them.

    Three channels are red, green and blue; any other number of channels lie side by side. Small images are enlarged by
    a whole factor until the grid is about ``side`` pixels wide.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    shown = to_pixels(images, grey_levels)
    times = max(1, round(side / (columns * shown.shape[-1])))
    shown = shown.repeat_interleave(times, -1).repeat_interleave(times, -2)
    return _lay_out(shown.expand(-1, 3, -1, -1), columns, max(1, times // 2))


def _lay_out(images: Tensor, columns: int, margin: int) -> Tensor:
    """Images (n, 3, H, W), uint8, in rows of ``columns``, with a dark margin around each: (3, height, width)."""
    columns = min(columns, len(images))
    missing = -len(images) % columns
    images = F.pad(images, (margin, 0, margin, 0, 0, 0, 0, missing), value=DARK)
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # (3, rows, H, columns, W)
    return F.pad(rows.flatten(3).flatten(1, 2), (0, margin, 0, margin), value=DARK)


def labelled_rows(images: Tensor, grey_levels: int | None, labels: Sequence[str]) -> Tensor:
    """A grid as :func:`image_grid` makes it, of a row for each label, which stands in the margin to its left.

    Args:
        images: (rows · columns, C, H, W), a row after the other.
    """
    from PIL import Image, ImageDraw

    columns = len(images) // len(labels)
    channels, height, width = images.shape[1:]
    width *= 1 if channels in (1, 3) else channels
    grid = image_grid(images, grey_levels, columns, max(512, columns * width * math.ceil(TEXT / height)))
    row = (grid.shape[1] - 1) / len(labels)
    font = _font(round(max(12, min(20, row / 3))), "".join(labels))
    margin = math.ceil(max(map(font.getlength, labels))) + round(2 * font.size)
    image = Image.new("RGB", (margin + grid.shape[2], grid.shape[1]), "white")
    image.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (margin, 0))
    draw = ImageDraw.Draw(image)
    for i, text in enumerate(labels):
        draw.text((margin - font.size, (i + 0.5) * row), text, (32, 32, 32), font, anchor="rm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _font(size: int, text: str):
    """Pillow's own font, which has few letters beyond English ones; for others matplotlib's, where it is installed."""
    from PIL import ImageFont

    matplotlib = None if text.isascii() else find_spec("matplotlib")
    if matplotlib is None or matplotlib.origin is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)


def to_pixels(images: Tensor, grey_levels: int | None, ends: tuple[float, float] | None = None) -> Tensor:
    """Images (n, C, H, W) as pixels (n, 1 or 3, H, W'), uint8 on the CPU, as :func:`image_grid` shows them.

    Args:
        ends: numbers of a field that have the first and the last colour; None: those of :func:`field_ends`.
    """
    images = images.cpu().double()
    if images.shape[1] not in (1, 3):
        images = images.permute(0, 2, 1, 3).flatten(2)[:, None]
    if grey_levels is not None:
        return (images * 255 / (grey_levels - 1)).round().to(torch.uint8)
    return _shade_field(images, *(ends or field_ends(images)))


def field_ends(images: Tensor) -> tuple[float, float]:
    """The least and greatest thousandth of the numbers of a field (n, C, H, W)."""
    some = images.flatten()[:: max(1, images.numel() // 2**20)].double()
    return some.quantile(0.001).item(), some.quantile(0.999).item()


def _shade_field(images: Tensor, low: float, high: float) -> Tensor:
    """Real numbers (n, C, H, W) as colours (n, 3, H, W), uint8."""
    scaled = (images - low) / (high - low if high > low else 1.0)
    if images.shape[1] == 1:
        return shade(scaled[:, 0]).movedim(0, 1)
    return (scaled.clamp(0, 1) * 255).round().to(torch.uint8)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W), uint8; ``path`` never holds a partial file. Raises WriteError."""
    from PIL import Image

    data = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, format="png")
    files.write(path, data.getvalue())
