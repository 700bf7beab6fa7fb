"""The colour map of the density plots."""

from __future__ import annotations

import torch
from torch import Tensor

# matplotlib's viridis (Smith, van der Walt and Firing 2015, CC0) at multiples of 1/16
VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 "
    "fde725"
)
GREY = (96, 96, 96)  # for NaN


def shade(values: Tensor) -> Tensor:
    """Map numbers (…) to colours (3, …), uint8: dark blue up to 0, yellow from 1 on, grey for NaN."""
    table = torch.tensor([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()], dtype=torch.float64)
    at = values.double().nan_to_num(0.0).clamp(0, 1) * (len(table) - 1)
    lower = at.long().clamp(max=len(table) - 2)
    rgb = torch.lerp(table[lower], table[lower + 1], (at - lower)[..., None])
    rgb[values.isnan()] = torch.tensor(GREY, dtype=rgb.dtype)
    return rgb.round().to(torch.uint8).movedim(-1, 0)
