"""A link from a box to real numbers that leaves its inside as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.bijections.bijection import Bijection, full_precision

SHARE = 0.1  # of the width, at each end, that is stretched to infinity


class StretchedEdges(Bijection):
    """z = x inside a box, and logarithms of the distance in its outer tenths; x in dimensions without two bounds.

    At the lower end, for d = x − low below e = 0.1·(high − low), z = low + e + e·log(d/e), whose slope is 1 at d = e;
    likewise at the upper end. A logit instead stretches the whole inside, and a flow then learns posteriors whose width
    depends on where they are. ``inverse`` stays within the bounds.

    Args:
        shape: (D,).
        ends: (low, high) of each dimension, None where it has no bound.
    """

    low: Tensor
    high: Tensor
    edge: Tensor
    bounded: Tensor

    def __init__(self, shape, ends: Sequence[tuple[float | None, float | None]], context_shape=None):
        super().__init__(shape, context_shape)
        bounded = [None not in pair for pair in ends]
        low, high = torch.tensor(
            [pair if known else (0.0, 1.0) for pair, known in zip(ends, bounded)], dtype=torch.float64
        ).T
        self.register_buffer("bounded", torch.tensor(bounded))
        least, greatest = low.float(), high.float()  # float32 may have rounded outwards
        self.register_buffer("low", torch.where(least < low, torch.nextafter(least, greatest), least))
        self.register_buffer("high", torch.where(greatest > high, torch.nextafter(greatest, least), greatest))
        self.register_buffer("edge", (SHARE * (high - low)).float())

    def forward(self, x, context=None):
        with full_precision(x):
            tiny = torch.finfo(x.dtype).eps
            below, above = ((d / self.edge).clamp(tiny, 1.0) for d in (x - self.low, self.high - x))
            z = torch.where(below < 1, self.low + self.edge * (1 + below.log()), x)
            z = torch.where(above < 1, self.high - self.edge * (1 + above.log()), z)
            log_slope = -below.log() - above.log()
            return torch.where(self.bounded, z, x), torch.where(self.bounded, log_slope, 0.0).sum(1)

    def inverse(self, z, context=None):
        with full_precision(z):
            below, above = (d / self.edge - 1 for d in (z - self.low, self.high - z))
            x = torch.where(below < 0, self.low + self.edge * below.clamp(max=0).exp(), z)
            x = torch.where(above < 0, self.high - self.edge * above.clamp(max=0).exp(), x)
            log_slope = below.clamp(max=0) + above.clamp(max=0)
            x = torch.clamp(x, self.low, self.high)
            return torch.where(self.bounded, x, z), torch.where(self.bounded, log_slope, 0.0).sum(1)
