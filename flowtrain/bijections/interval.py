"""From a distance to a bound to the real line: the link of all data that have bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EDGE = 0.1  # of the width, at each end, that is stretched to infinity
SLOPE = 3.25  # between the edges: uniform numbers get a deviation of 1


def to_line(gap: Tensor, boxed: Tensor) -> tuple[Tensor, Tensor]:
    """y of the distance to a bound, and log dy/dgap.

    Where there is one bound, y = log(gap). In a box, y = SLOPE·(gap − ½), a line through its middle, continued for a
    gap below EDGE by SLOPE·(EDGE + EDGE·log(gap/EDGE) − ½), which has the same slope there; the other half is the
    mirror image. A logit stretches the inside too, and a flow then has to learn densities whose width depends on where
    they are.

    Args:
        gap: above 0, to the nearer of two bounds as a share of the width, so at most ½, or to an only bound.
        boxed: whether there are two.

    >>> to_line(torch.tensor([1e-9, 0.4, 1.0]), torch.tensor([True, True, False]))[0]
    tensor([-7.2867, -0.3250,  0.0000])
    """
    near = boxed & (gap < EDGE)
    log = torch.where(boxed, torch.where(near, gap / EDGE, 1.0), gap).log()
    line = SLOPE * (torch.where(near, EDGE, gap) - 0.5 + EDGE * log)
    return torch.where(boxed, line, log), torch.where(boxed, math.log(SLOPE) - log, -log)


def from_line(y: Tensor, boxed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_line`: the distance to the bound, at most the largest number, and log dgap/dy.

    >>> from_line(torch.tensor([-1.3, -0.325, 0.0]), torch.tensor([True, True, False]))[0]
    tensor([0.1000, 0.4000, 1.0000])
    """
    line = y / SLOPE + 0.5
    near = boxed & (line < EDGE)
    log = torch.where(boxed, torch.where(near, line / EDGE - 1, 0.0), y)
    most = math.log(torch.finfo(y.dtype).max)
    gap = log.clamp(max=most).exp()
    gap = torch.where(boxed, torch.where(near, EDGE * gap, line), gap)
    return gap, torch.where(boxed, log - math.log(SLOPE), log)
