"""The precision of networks."""

from __future__ import annotations

import torch

from flowtrain.errors import UsageError


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of networks under ``precision``; None: that of their weights.

    Raises:
        UsageError: the hardware has no such arithmetic, so that it would cost time.
    """
    if precision == "float32":
        return None
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    if not has:
        raise UsageError(f"precision={precision}: this {device.type} has no bfloat16 arithmetic; use precision=float32")
    return torch.bfloat16
