"""Affine maps of short vectors in turn, as one C++ function, and one for its gradients."""

from __future__ import annotations

import ctypes
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


class _Step(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("order", "first", "second", "grad_first", "grad_second")),
    ]


# the tensors' places, the first and the last row, the size, the steps and their number
_FORWARD, _BACKWARD = (
    (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 3, ctypes.POINTER(_Step), ctypes.c_int64) for tensors in (3, 4)
)


def may_apply(size: int) -> bool:
    """Whether vectors of ``size`` numbers are short enough, and the function is there."""
    return size <= LONGEST and native.load(SOURCE) is not None


def affine(x: Tensor, steps: Sequence[Step], by_torch: Callable) -> tuple[Tensor, Tensor] | None:
    """x (B, D) mapped by ``steps`` in turn, and the log-determinant (B,); None where C++ does not apply.

    Args:
        by_torch: the same function of x by torch's operations, for derivatives of gradients.
    """
    tensors = [one for step in steps for one in step[1:] if one is not None]
    numbers = [one for one in tensors if one.is_floating_point()]
    fits = x.dim() == 2 and all(one.shape[-1] == x.shape[1] and one.is_contiguous() for one in tensors)
    if not (fits and native.applies(x) and native.in_memory(*tensors)) or any(one.dtype != x.dtype for one in numbers):
        return None
    return _Affine.apply(x, steps, by_torch, *numbers)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, steps, by_torch, *numbers):
        ctx.save_for_backward(x, *numbers)
        ctx.steps, ctx.by_torch = steps, by_torch
        x = x.contiguous()
        y, log_det = torch.empty_like(x), x.new_empty(len(x))
        size, pointers = x.shape[1], [one.data_ptr() for one in (x, y, log_det)]
        table, function = _table(steps, None), native.function(SOURCE, "forward", x.dtype, _FORWARD)

        def compute(part, first, last):
            function(*pointers, first, last, size, table, len(steps))

        native.in_parts(compute, len(x), size * size)
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
        found = [[torch.zeros_like(one) for one in numbers] for _ in range(native.parts(len(x), size * size))]
        tables = [_table(ctx.steps, one) for one in found]
        pointers = [one.data_ptr() for one in (x, *grads, grad_x)]
        function, count = native.function(SOURCE, "backward", x.dtype, _BACKWARD), len(ctx.steps)

        def compute(part, first, last):
            function(*pointers, first, last, size, tables[part], count)

        native.in_parts(compute, len(x), size * size)
        return grad_x, None, None, *(sum(same[1:], same[0]) for same in zip(*found))


def _table(steps: Sequence[Step], grads: list[Tensor] | None) -> ctypes.Array:
    """The steps, and where their gradients are added, as C++ reads them."""
    each = iter(grads or ())
    table = (_Step * len(steps))()
    for row, step in zip(table, steps):
        row.kind = step.kind
        row.order = None if step.order is None else step.order.data_ptr()
        for name in ("first", "second"):
            if (numbers := getattr(step, name)) is not None:
                setattr(row, name, numbers.data_ptr())
                setattr(row, f"grad_{name}", next(each).data_ptr() if grads else None)
    return table
