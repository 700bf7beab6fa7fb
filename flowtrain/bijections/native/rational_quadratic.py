"""The rational-quadratic spline by C++ functions: one for each direction, and one for the gradients of each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.runtime import gradients, modes, native

SOURCE = Path(__file__).with_suffix(".cpp")


class Layout(ctypes.Structure):
    """Where θ lies: number i of row r has its parameter p at r·row + i·element + p·parameter."""

    _fields_ = [(name, ctypes.c_int64) for name in ("columns", "row", "element", "parameter")]


# the tensors' places, the first and the last number, the layout of θ, the settings, and whether it is the inverse
_FORWARD, _BACKWARD = (
    (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 2, ctypes.POINTER(Layout), ctypes.c_void_p, ctypes.c_int)
    for tensors in (4, 6)
)


def spline(
    values: Tensor, theta: Tensor, settings: Sequence[float], inverse: bool, by_torch: Callable
) -> tuple[Tensor, Tensor] | None:
    """The mapped values and the logarithms of the derivatives, as by :class:`flowtrain.bijections.RationalQuadratic`;
    None where C++ does not apply.

    Args:
        settings: the numbers of ``Settings`` in the C++ file, in order.
        by_torch: the same function of ``values`` and ``theta`` by torch's operations, for derivatives of gradients.
    """
    each = values.shape if theta.dim() > values.dim() else values.shape[1:]
    if values.dtype != theta.dtype or theta.shape != (*each, 3 * settings[0] - 1):  # torch broadcasts, or refuses
        return None
    if torch.compiler.is_compiling():  # an operator that the compiler takes as it is; no exported program has it
        is_exported = torch.compiler.is_exporting() or modes.current().tracing
        by_operator = not is_exported and _compiles_on(values.device.type)
        return _operator(values, theta, list(settings), inverse) if by_operator else None
    if not native.applies(values, theta) or native.load(SOURCE) is None:
        return None
    return _Spline.apply(values, theta, settings, inverse, by_torch)


@torch.compiler.assume_constant_result
def _compiles_on(device: str) -> bool:
    return device == "cpu" and native.load(SOURCE) is not None


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, theta, settings, inverse, by_torch):
        ctx.save_for_backward(values, theta)
        ctx.settings, ctx.inverse, ctx.by_torch = settings, inverse, by_torch
        return _forward(values, theta, settings, inverse)

    @staticmethod
    def backward(ctx, *grads):
        values, theta = ctx.saved_tensors
        if gradients.in_place(*grads):
            found = _backward(values, theta, *grads, ctx.settings, ctx.inverse)
        else:
            inputs, needed = (values, theta), ctx.needs_input_grad[:2]
            found = gradients.by_autograd(lambda: ctx.by_torch(*inputs), inputs, needed, grads)
        return *found, None, None, None


def _forward(values: Tensor, theta: Tensor, settings: Sequence[float], inverse: bool) -> tuple[Tensor, Tensor]:
    values = values.contiguous()
    results = torch.empty_like(values), torch.empty_like(values)
    rows, layout = _rows(theta, values)
    pointers = [one.data_ptr() for one in (values, rows, *results)]
    function, numbers = native.function(SOURCE, "forward", values.dtype, _FORWARD), _numbers(settings)

    def compute(part, first, last):
        function(*pointers, first, last, layout, numbers, inverse)

    native.in_parts(compute, values.numel(), rows.shape[-1])
    return results


def _backward(
    values: Tensor, theta: Tensor, grad_out: Tensor, grad_log: Tensor, settings: Sequence[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    inputs = [one.contiguous() for one in (values, grad_out, grad_log)]
    values = inputs[0]
    rows, layout = _rows(theta, values)
    grad_rows = torch.empty_like(rows)
    if grad_rows.stride() != rows.stride():  # a part of a larger tensor: the gradient has a layout of its own
        rows, layout = _rows(theta.contiguous(), values)
        grad_rows = torch.empty_like(rows)
    # θ that all rows share has a sum of gradients for each thread
    sums = native.parts(values.numel(), rows.shape[-1]) if layout.row == 0 else 0
    grad_values = torch.empty_like(values)
    grad_rows = rows.new_zeros(sums, *rows.shape) if sums else grad_rows[None]
    pointers = [one.data_ptr() for one in (values, rows, *inputs[1:], grad_values)]
    function, numbers = native.function(SOURCE, "backward", values.dtype, _BACKWARD), _numbers(settings)

    def compute(part, first, last):
        function(*pointers, grad_rows[part if sums else 0].data_ptr(), first, last, layout, numbers, inverse)

    native.in_parts(compute, values.numel(), rows.shape[-1])
    return grad_values, (grad_rows.sum(0) if sums > 1 else grad_rows[0]).view(theta.shape)


def _rows(theta: Tensor, values: Tensor) -> tuple[Tensor, Layout]:
    """θ as rows of numbers (B, n, parameters), or (n, parameters) where all rows share it, and its layout."""
    shared = theta.dim() == values.dim()
    first = 0 if shared else 1
    rows = theta.flatten(first, -2) if theta.dim() > first + 1 else theta.unsqueeze(first)
    if shared or 0 in rows.stride():  # an expanded θ: each number's gradient needs a place of its own
        rows = rows.contiguous()
    row = 0 if shared else rows.stride(0)
    return rows, Layout(rows.shape[-2], row, *rows.stride()[-2:])


def _numbers(settings: Sequence[float]) -> ctypes.Array:
    return (ctypes.c_double * len(settings))(*settings)


# ---- for torch.compile, an operator with a gradient; in eager mode the function above costs less


@torch.library.custom_op("flowtrain::rational_quadratic", mutates_args=(), device_types="cpu")
def _operator(values: Tensor, theta: Tensor, settings: list[float], inverse: bool) -> tuple[Tensor, Tensor]:
    return _forward(values, theta, settings, inverse)


@torch.library.custom_op("flowtrain::rational_quadratic_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    values: Tensor, theta: Tensor, grad_out: Tensor, grad_log: Tensor, settings: list[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    grad_values, grad_theta = _backward(values, theta, grad_out, grad_log, settings, inverse)
    return grad_values, grad_theta.contiguous()


@_operator.register_fake
def _(values, theta, settings, inverse):
    return values.new_empty(values.shape), values.new_empty(values.shape)


@_operator_backward.register_fake
def _(values, theta, grad_out, grad_log, settings, inverse):
    return values.new_empty(values.shape), theta.new_empty(theta.shape)


def _setup(ctx, inputs, output):
    values, theta, ctx.settings, ctx.inverse = inputs
    ctx.save_for_backward(values, theta)


def _gradients(ctx, grad_out, grad_log):
    return *_operator_backward(*ctx.saved_tensors, grad_out, grad_log, ctx.settings, ctx.inverse), None, None


_operator.register_autograd(_gradients, setup_context=_setup)
