"""Grids of images."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.runtime import files


def image_grid(images: Tensor, grey_levels: int, columns: int | None = None, side: int = 512) -> Tensor:
    """Arrange integer images (n, C, H, W) of ``grey_levels`` grey levels in one image (3, height, width), uint8.

    Small images are enlarged by a whole factor until the grid is about ``side`` pixels wide.
    """
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    shown = (images.cpu().double() * 255 / (grey_levels - 1)).round().to(torch.uint8)
    times = max(1, round(side / (columns * images.shape[-1])))
    shown = shown.repeat_interleave(times, -1).repeat_interleave(times, -2)
    return make_grid(shown, columns, padding=max(1, times // 2), pad_value=64)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W), uint8; ``path`` never holds a partial file. Raises WriteError."""
    from PIL import Image

    data = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, format="png")
    files.write(path, data.getvalue())
