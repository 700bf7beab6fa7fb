"""Grids of images."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.runtime import files


def grid(images: Tensor, levels: int, columns: int | None = None, side: int = 512) -> Tensor:
    """Integer images (n, C, H, W) of ``levels`` levels as one (3, height, width) uint8 image.

    Small ones are enlarged by whole pixels until the grid is about ``side`` wide.
    """
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    shown = (images.cpu().double() * 255 / (levels - 1)).round().to(torch.uint8)
    times = max(1, round(side / (columns * images.shape[-1])))
    shown = shown.repeat_interleave(times, -1).repeat_interleave(times, -2)
    return make_grid(shown, columns, padding=max(1, times // 2), pad_value=64)


def save_png(image: Tensor, path: Path) -> None:
    """Write a (3, H, W) uint8 image; a half-written file never stands under ``path``. Raises WriteError."""
    from PIL import Image

    data = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, format="png")
    files.write(path, data.getvalue())
