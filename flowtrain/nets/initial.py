"""Numbers that weights start from."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def random_normal(*shape: int, std: float) -> Tensor:
    """Numbers drawn from a normal distribution. On the meta device, which has no numbers, nothing is drawn: torch would
    import its compiler for that, which takes seconds."""
    numbers = torch.empty(shape)
    return numbers if numbers.is_meta else numbers.normal_(std=std)


def on_default_device(numbers: Tensor) -> Tensor:
    """A constant that was computed on the CPU, where torch creates tensors now. Arithmetic on the meta device would
    import the compiler too."""
    return numbers.to(torch.get_default_device())


def zero_init(layer: Module) -> Module:
    """``layer`` with all parameters 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def small_init(layer: Module) -> Module:
    """``layer`` with small parameters: a residual block with such a second layer starts near the identity."""
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1e-3, 1e-3)
    return layer
