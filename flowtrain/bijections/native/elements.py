"""Univariate maps by C++ functions: one for each direction, and one for its gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.runtime import native

RATIONAL_QUADRATIC = Path(__file__).with_name("rational_quadratic.cpp")
_NAMES = {torch.float32: "float32", torch.float64: "float64"}


class Layout(ctypes.Structure):
    """Where θ lies: number i of row r has its parameter p at r·row + i·element + p·parameter."""

    _fields_ = [(name, ctypes.c_int64) for name in ("columns", "row", "element", "parameter")]


def map_elements(
    source: Path, values: Tensor, theta: Tensor, settings: ctypes.Structure, inverse: bool, by_torch: Callable
) -> tuple[Tensor, Tensor] | None:
    """The mapped values and the logarithms of the derivatives, as by :class:`flowtrain.bijections.Univariate`; None
    where C++ does not apply.

    Args:
        source: of the functions, which read ``settings``.
        by_torch: the same function of ``values`` and ``theta`` by torch's operations, for derivatives of gradients.
    """
    if values.dtype != theta.dtype or not native.applies(values, theta) or not native.load(source):
        return None
    return _Elements.apply(values, theta, source, settings, inverse, by_torch)


class _Elements(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, theta, source, settings, inverse, by_torch):
        ctx.save_for_backward(values, theta)
        ctx.call, ctx.by_torch = (source, settings, inverse), by_torch
        values = values.contiguous()
        results = torch.empty_like(values), torch.empty_like(values)
        rows, layout = _rows(theta, values)
        pointers = [one.data_ptr() for one in (values, rows, *results)]
        function = _function(source, "forward", values.dtype)

        def compute(part, first, last):
            function(*pointers, first, last, layout, ctypes.byref(settings), inverse)

        native.in_parts(compute, values.numel(), rows.shape[-1])
        return results

    @staticmethod
    def backward(ctx, *grads):
        values, theta = ctx.saved_tensors
        if torch.is_grad_enabled() or not native.applies(*grads):
            found = iter(_differentiable_gradients(ctx, values, theta, grads))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None, None, None
        values, grads = values.contiguous(), [one.contiguous() for one in grads]
        source, settings, inverse = ctx.call
        rows, layout = _rows(theta, values)
        # θ that all rows share has a sum of gradients for each thread
        sums = native.parts(values.numel(), rows.shape[-1]) if layout.row == 0 else 0
        grad_values = torch.empty_like(values)
        grad_rows = rows.new_zeros(sums, *rows.shape) if sums else torch.empty_like(rows)[None]
        pointers = [one.data_ptr() for one in (values, rows, *grads, grad_values)]
        function = _function(source, "backward", values.dtype)

        def compute(part, first, last):
            to = grad_rows[part if sums else 0].data_ptr()
            function(*pointers, to, first, last, layout, ctypes.byref(settings), inverse)

        native.in_parts(compute, values.numel(), rows.shape[-1])
        grad_theta = grad_rows.sum(0) if sums > 1 else grad_rows[0]
        return grad_values, grad_theta.view(theta.shape), None, None, None, None


def _differentiable_gradients(ctx, values, theta, grads):
    with torch.enable_grad():
        inputs = [one for one, needed in zip((values, theta), ctx.needs_input_grad) if needed]
        return torch.autograd.grad(ctx.by_torch(values, theta), inputs, grads, create_graph=True, allow_unused=True)


def _rows(theta: Tensor, values: Tensor) -> tuple[Tensor, Layout]:
    """θ as rows of numbers (B, n, parameters), or (n, parameters) where all rows share it, and its layout."""
    shared = theta.dim() == values.dim()
    first = 0 if shared else 1
    rows = theta.flatten(first, -2) if theta.dim() > first + 1 else theta.unsqueeze(first)
    if shared or 0 in rows.stride():  # an expanded θ: each number's gradient needs a place of its own
        rows = rows.contiguous()
    row = 0 if shared else rows.stride(0)
    return rows, Layout(rows.shape[-2], row, *rows.stride()[-2:])


@cache
def _function(source: Path, direction: str, dtype: torch.dtype) -> Callable:
    function = getattr(native.load(source), f"{direction}_{_NAMES[dtype]}")
    tensors = 4 if direction == "forward" else 6
    layout = ctypes.POINTER(Layout)
    function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * 2 + [layout, ctypes.c_void_p, ctypes.c_int]
    function.restype = None
    return function
