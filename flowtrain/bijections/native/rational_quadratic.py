"""The rational-quadratic spline by C++ functions: one for each direction, and one for the gradients of each."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.runtime import gradients, native

SOURCE = Path(__file__).with_suffix(".cpp")

# the tensors' places, the numbers and their parts, the layouts of θ, the settings, and whether it is the inverse
_FORWARD, _BACKWARD = (
    (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 2, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
    for tensors in (3, 4)
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
    if native.as_operator(values, theta) and is_built():
        return _operator(values, theta, None, None, list(settings), inverse)
    if not native.applies(values, theta) or not is_built():
        return None
    return _Spline.apply(values, theta, None, None, settings, inverse, by_torch)


def spline_of_parts(
    values: Tensor, theta: Tensor, shared: Tensor, places: Tensor, settings: Sequence[float], by_torch: Callable
) -> tuple[Tensor, Tensor] | None:
    """The map and the logarithms of its derivatives of vectors (B, D) of which some numbers have parameters of their
    own in each row, and all rows share those of the others; None where C++ does not apply.

    Args:
        theta: of the former, (B, n, parameters).
        shared: of the latter, (D − n, parameters).
        places: (D,), i for a number that has ``theta[:, i]`` and −1 − i for one that has ``shared[i]``.
    """
    if not values.dtype == theta.dtype == shared.dtype:
        return None
    if native.as_operator(values, theta, shared) and is_built():
        return _operator(values, theta, shared, places, list(settings), False)
    if not native.applies(values, theta, shared) or not is_built():
        return None
    return _Spline.apply(values, theta, shared, places, settings, False, by_torch)


@native.constant_when_compiled
def is_built() -> bool:
    """Whether there are C++ functions of splines."""
    return native.load(SOURCE) is not None


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, theta, shared, places, settings, inverse, by_torch):
        ctx.save_for_backward(values, theta, shared)
        ctx.places, ctx.settings, ctx.inverse, ctx.by_torch = places, settings, inverse, by_torch
        return forward(values, theta, shared, places, settings, inverse)

    @staticmethod
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        if gradients.in_place(*grads):
            found = backward(*inputs, ctx.places, *grads, ctx.settings, ctx.inverse)
        else:
            given = [one for one in inputs if one is not None]
            needed = ctx.needs_input_grad[: len(given)]
            found = gradients.by_autograd(lambda: ctx.by_torch(*given), given, needed, grads)
        return *found, *[None] * (7 - len(found))


def forward(
    values: Tensor, theta: Tensor, shared: Tensor | None, places: Tensor | None, settings, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Both results, without a gradient; the arguments are those of :func:`spline` and :func:`spline_of_parts`."""
    values = values.contiguous()
    results = torch.empty_like(values), torch.empty_like(values)
    sources = [_rows(one, values) for one in (theta, shared) if one is not None]
    pointers = [one.data_ptr() for one in (values, *results)]
    parts = native.parts(values.numel(), theta.shape[-1])
    layouts, function = _layout(places, sources) * parts, native.function(SOURCE, "forward", values.dtype, _FORWARD)
    function(*pointers, values.numel(), parts, layouts, _numbers(settings), inverse)
    return results


def backward(
    values: Tensor,
    theta: Tensor,
    shared: Tensor | None,
    places: Tensor | None,
    grad_out: Tensor,
    grad_log: Tensor,
    settings,
    inverse: bool,
) -> tuple[Tensor, ...]:
    """The gradients of ``values``, ``theta`` and, if there is one, ``shared``, given those of both results."""
    inputs = [one.contiguous() for one in (values, grad_out, grad_log)]
    values = inputs[0]
    parts, sources, grads = native.parts(values.numel(), theta.shape[-1]), [], []
    given = [theta] if shared is None else [theta, shared]
    for one in given:
        rows = _rows(one, values)
        if not rows.row:  # a sum of gradients for each part
            grads.append(rows.numbers.new_zeros(parts, *rows.numbers.shape))
        else:
            grad = torch.empty_like(rows.numbers)
            if grad.stride() != rows.numbers.stride():  # a part of a larger tensor: it has a layout of its own
                rows = _rows(one.contiguous(), values)
                grad = torch.empty_like(rows.numbers)
            grads.append(grad)
        sources.append(rows)
    grad_values = torch.empty_like(values)
    pointers = [one.data_ptr() for one in (*inputs, grad_values)]
    layouts = b"".join(_layout(places, sources, grads, part) for part in range(parts))
    native.function(SOURCE, "backward", values.dtype, _BACKWARD)(
        *pointers, values.numel(), parts, layouts, _numbers(settings), inverse
    )
    found = [grad if rows.row or parts == 1 else grad.sum(0) for rows, grad in zip(sources, grads)]
    return grad_values, *(grad.view(one.shape) for grad, one in zip(found, given))


class _Rows(NamedTuple):
    """θ as rows of numbers (B, n, parameters), or (n, parameters) where all rows share it, and its strides; that of the
    row is 0 where all share it."""

    numbers: Tensor
    row: int
    element: int
    parameter: int


def _rows(theta: Tensor, values: Tensor) -> _Rows:
    shared = theta.dim() == values.dim()
    first = 0 if shared else 1
    rows = theta.flatten(first, -2) if theta.dim() > first + 2 else theta
    if theta.dim() < first + 2:
        rows = theta.unsqueeze(first)
    if shared or 0 in rows.stride():  # an expanded θ: each number's gradient needs a place of its own
        rows = rows.contiguous()
    *row, element, parameter = rows.stride()
    return _Rows(rows, 0 if shared else row[0], element, parameter)


def _layout(places: Tensor | None, sources: Sequence[_Rows], grads: Sequence[Tensor] = (), part: int = 0) -> bytes:
    """A ``Layout`` of the C++ file: number i of row r has its parameter p at r·row + i·element + p·parameter. A part of
    the numbers adds up the gradients of a shared θ in a place of its own."""
    columns = sources[0].numbers.shape[-2] if places is None else places.shape[0]
    layout = [columns, native.pointer(places)]
    for number, (numbers, row, *strides) in enumerate(sources):
        to = grads[number].data_ptr() if grads else 0
        if to and not row:
            to += part * numbers.numel() * numbers.itemsize
        layout += numbers.data_ptr(), to, row, *strides
    return struct.pack("12q", *layout, *[0] * (12 - len(layout)))


@cache
def _numbers(settings: tuple[float, ...]) -> ctypes.Array:
    return (ctypes.c_double * len(settings))(*settings)


# ---- for torch.compile, an operator with a gradient; in eager mode the function above costs less


@torch.library.custom_op("flowtrain::rational_quadratic", mutates_args=(), device_types="cpu")
def _operator(
    values: Tensor, theta: Tensor, shared: Tensor | None, places: Tensor | None, settings: list[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    return forward(values, theta, shared, places, tuple(settings), inverse)


@torch.library.custom_op("flowtrain::rational_quadratic_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    values: Tensor,
    theta: Tensor,
    shared: Tensor | None,
    places: Tensor | None,
    grad_out: Tensor,
    grad_log: Tensor,
    settings: list[float],
    inverse: bool,
) -> list[Tensor]:
    found = backward(values, theta, shared, places, grad_out, grad_log, tuple(settings), inverse)
    return [one.contiguous() for one in found]


@_operator.register_fake
def _(values, theta, shared, places, settings, inverse):
    return values.new_empty(values.shape), values.new_empty(values.shape)


@_operator_backward.register_fake
def _(values, theta, shared, places, grad_out, grad_log, settings, inverse):
    return [one.new_empty(one.shape) for one in (values, theta, shared) if one is not None]


def _setup(ctx, inputs, output):
    *tensors, ctx.settings, ctx.inverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, *grads):
    found = _operator_backward(*ctx.saved_tensors, *grads, ctx.settings, ctx.inverse)
    return *found, *[None] * (6 - len(found))


_operator.register_autograd(_gradients, setup_context=_setup)
