"""The precision of networks, and what float32 means on a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from flowtrain.errors import UsageError


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of networks under ``precision``; None: that of their weights.

    Raises:
        UsageError: the hardware has no such arithmetic. Emulated, it would cost time.
    """
    if not supports(device, precision):
        kind = "GPU" if device.type == "cuda" else "CPU"
        name = "TensorFloat-32" if precision == "tf32" else precision
        raise UsageError(f"precision={precision}: this {kind} has no {name} arithmetic; use precision=float32")
    return torch.bfloat16 if precision == "bfloat16" else None


def supports(device: torch.device, precision: str) -> bool:
    """Whether the hardware itself computes in ``precision``."""
    if precision == "float32":
        return True
    if precision == "tf32":
        return device.type == "cuda" and torch.cuda.is_tf32_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def set_tf32(precision: str) -> None:
    """From now on a GPU's matrix products and its convolutions read float32 numbers as TensorFloat-32, with 10 bits in
    place of 23, where ``precision`` is tf32, and exactly otherwise. torch's own default is yes for convolutions and no
    for products."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextmanager
def tf32_as(precision: str):
    """:func:`set_tf32` within it."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    set_tf32(precision)
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


def exact_arithmetic():
    """Within it, float32 is exact."""
    return tf32_as("float32")
