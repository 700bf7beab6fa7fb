"""Affine maps of short vectors in turn, as one C++ function, and one for its gradients."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.runtime import gradients, native

SOURCE = Path(__file__).with_suffix(".cpp")
LONGEST = 32  # a longer vector's products are faster as products of matrices
PERMUTE, SCALE, TRIANGULAR = range(3)


class Step(NamedTuple):
    """An affine map of vectors (B, D).

    - PERMUTE: yᵢ = x[orderᵢ]
    - SCALE: y = (x + first)·exp(second)
    - TRIANGULAR: yᵢ = (L·U·x)[orderᵢ], where ``first`` (D, D) holds L below its diagonal of ones, U above its own, and
      log|diag U| on it; ``second`` has the signs of that diagonal.
    """

    kind: int
    order: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None


# the tensors' places, the rows and their parts, the size, the steps and their number
_FORWARD, _BACKWARD = (
    (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 3, ctypes.c_char_p, ctypes.c_int64) for tensors in (3, 4)
)


def may_apply(size: int) -> bool:
    """Whether vectors of ``size`` numbers are short enough, and the function is there."""
    return size <= LONGEST and native.load(SOURCE) is not None


def affine(x: Tensor, steps: Sequence[Step], by_torch: Callable) -> tuple[Tensor, Tensor] | None:
    """x (B, D) mapped by ``steps`` in turn, and the log-determinant (B,); None where C++ does not apply.

    Args:
        by_torch: the same function of x by torch's operations, for derivatives of gradients.
    """
    given = [one for _, *tensors in steps for one in tensors if one is not None]
    if x.dim() != 2 or x.dtype not in native.NAMES or not native.in_memory(x, *given):
        return None
    numbers = [one for one in given if one.is_floating_point()]
    for one in given:
        if one.shape[-1] != x.shape[1] or not one.is_contiguous():
            return None
    for one in numbers:
        if one.dtype != x.dtype:
            return None
    return _Affine.apply(x, steps, by_torch, *numbers)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, steps, by_torch, *numbers):
        ctx.save_for_backward(x, *numbers)
        ctx.steps, ctx.by_torch = steps, by_torch
        x = x.contiguous()
        y, log_det = torch.empty_like(x), x.new_empty(x.shape[0])
        size, pointers = x.shape[1], [one.data_ptr() for one in (x, y, log_det)]
        parts = native.parts(x.shape[0], size * size)
        native.function(SOURCE, "forward", x.dtype, _FORWARD)(
            *pointers, x.shape[0], parts, size, _table(steps, None), len(steps)
        )
        return y, log_det

    @staticmethod
    def backward(ctx, *grads):
        x, *numbers = ctx.saved_tensors
        if not gradients.in_place(*grads):
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
            found = gradients.by_autograd(lambda: ctx.by_torch(x), (x, *numbers), needed, grads)
            return found[0], None, None, *found[1:]
        x, grads = x.contiguous(), [one.contiguous() for one in grads]
        size, grad_x = x.shape[1], torch.empty_like(x)
        found = [[*map(torch.zeros_like, numbers)] for _ in range(native.parts(x.shape[0], size * size))]
        tables = b"".join(_table(ctx.steps, one) for one in found)
        pointers = [one.data_ptr() for one in (x, *grads, grad_x)]
        native.function(SOURCE, "backward", x.dtype, _BACKWARD)(
            *pointers, x.shape[0], len(found), size, tables, len(ctx.steps)
        )
        return grad_x, None, None, *(sum(same[1:], same[0]) for same in zip(*found))


def _table(steps: Sequence[Step], grads: list[Tensor] | None) -> bytes:
    """The steps as C++ reads them, and where their gradients are added."""
    table: list[int] = []
    to = iter(grads or ())
    for kind, order, *numbers in steps:
        table += kind, native.pointer(order)
        table += map(native.pointer, numbers)
        table += [0 if one is None or not grads else next(to).data_ptr() for one in numbers]
    return struct.pack(f"{len(table)}q", *table)
