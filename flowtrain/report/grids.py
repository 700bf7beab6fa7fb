"""Grids of images in one, and formats of numbers."""

from __future__ import annotations

import math

import numpy as np

GAP = 128  # the grey between images: seen on a light page and on a dark one


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Images (n, H, W, C) uint8 in one, row by row: (H', W', C).

    >>> grid(np.zeros((5, 8, 8, 1), np.uint8), columns=3).shape
    (19, 28, 1)
    """
    n, height, width, channels = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    out = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), GAP, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        out[top : top + height, left : left + width] = image
    return out


def plus_minus(value: float, error: float | None, digits: int = 4) -> str:
    """A figure and its standard error.

    >>> plus_minus(-3.14159, 0.002), plus_minus(2.5, None, 1)
    ('−3.1416 ± 0.0020', '2.5')
    """
    text = f"{value:,.{digits}f}".replace("-", "−")
    return text if error is None else f"{text} ± {error:,.{digits}f}"


def share(part: float) -> str:
    """A share in percent: two digits, more near 0 and 1.

    >>> share(0.126), share(0.00034), share(1)
    ('13 %', '0.034 %', '100 %')
    """
    return f"{100 * part:.2g} %" if 0 < part < 0.995 else f"{100 * part:.3g} %"
