"""Affine maps of some numbers of each vector by C++ functions: one for both directions, and one for the gradients."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.runtime import gradients, native

SOURCE = Path(__file__).with_suffix(".cpp")
EXPONENTIAL, SIGMOID, TANH = range(3)
WORK = 16  # of a number, in operations

# the tensors' places, the rows and their parts, the layout, the settings, and whether it is the inverse
_FORWARD, _BACKWARD = (
    (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 2, *[ctypes.c_char_p] * 2, ctypes.c_int) for tensors in (5, 8)
)


def affine(
    x: Tensor,
    theta: Tensor,
    settings: Sequence[float],
    rescale: Tensor | None,
    places: Tensor | None,
    inverse: bool,
    by_torch: Callable,
) -> tuple[Tensor, Tensor] | None:
    """The mapped vectors (B, D) and the log-determinant (B,); None where C++ does not apply.

    Args:
        theta: t and the raw number of s for each number that is mapped, (B, n, 2).
        settings: the numbers of ``Settings`` in the C++ file, in order.
        rescale: what tanh is multiplied by, (n,), for that kind alone.
        places: (n,), those of the numbers that are mapped; None: of all, in order.
        by_torch: the same function of ``x`` and ``theta`` by torch's operations, for derivatives of gradients.
    """
    given = (x, theta) if rescale is None else (x, theta, rescale)
    by_operator = native.as_operator(*given)
    if not (by_operator or native.applies(*given)) or not is_built():
        return None
    if x.dim() != 2 or theta.dim() != 3 or theta.shape[0] != x.shape[0]:  # torch broadcasts
        return None
    if x.dtype != theta.dtype or rescale is not None and rescale.dtype != x.dtype:
        return None
    if by_operator:
        return _operator(x, theta, rescale, places, list(settings), inverse)
    return _AffineElements.apply(x, theta, rescale, places, settings, inverse, by_torch)


@native.constant_when_compiled
def is_built() -> bool:
    """Whether there are C++ functions of affine maps."""
    return native.load(SOURCE) is not None


class _AffineElements(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, rescale, places, settings, inverse, by_torch):
        ctx.save_for_backward(x, theta, rescale)
        ctx.rest = places, settings, inverse, by_torch
        return _forward(x, theta, rescale, places, settings, inverse)

    @staticmethod
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        *rest, by_torch = ctx.rest
        if gradients.in_place(*grads):
            found = _backward(*inputs, *grads, *rest)
        else:
            given = [one for one in inputs if one is not None]
            needed = ctx.needs_input_grad[: len(given)]
            found = gradients.by_autograd(lambda: by_torch(*inputs[:2]), given, needed, grads)
        return *found, *[None] * (7 - len(found))


def _forward(x, theta, rescale, places, settings, inverse) -> tuple[Tensor, Tensor]:
    """Both results."""
    x = x.contiguous()
    y, log_det = torch.empty_like(x), x.new_empty(x.shape[0])
    pointers = [native.pointer(one) for one in (x, theta, rescale, y, log_det)]
    native.function(SOURCE, "forward", x.dtype, _FORWARD)(
        *pointers, x.shape[0], _parts(theta), _layout(x, theta, places), struct.pack("4d", *settings), inverse
    )
    return y, log_det


def _backward(x, theta, rescale, grad_y, grad_log_det, places, settings, inverse) -> list[Tensor]:
    """The gradients of x, of ``theta`` and, if there is one, of ``rescale``."""
    x, *grads, grad_theta = x.contiguous(), grad_y.contiguous(), grad_log_det.contiguous(), torch.empty_like(theta)
    if grad_theta.stride() != theta.stride():  # a part of a larger tensor, or rows share it
        theta = theta.contiguous()
        grad_theta = torch.empty_like(theta)
    parts, grad_x = _parts(theta), torch.empty_like(x)
    sums = None if rescale is None else x.new_zeros(parts, theta.shape[1])
    pointers = [native.pointer(one) for one in (x, theta, rescale, *grads, grad_x, grad_theta, sums)]
    native.function(SOURCE, "backward", x.dtype, _BACKWARD)(
        *pointers, x.shape[0], parts, _layout(x, theta, places), struct.pack("4d", *settings), inverse
    )
    return [grad_x, grad_theta, *([] if sums is None else [sums.sum(0)])]


def _parts(theta: Tensor) -> int:
    return native.parts(theta.shape[0], WORK * theta.shape[1])


def _layout(x: Tensor, theta: Tensor, places: Tensor | None) -> bytes:
    return struct.pack("6q", x.shape[1], theta.shape[1], native.pointer(places), *theta.stride())


# ---- for torch.compile, an operator with a gradient; in eager mode the function above costs less


@torch.library.custom_op("flowtrain::affine", mutates_args=(), device_types="cpu")
def _operator(
    x: Tensor, theta: Tensor, rescale: Tensor | None, places: Tensor | None, settings: list[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    return _forward(x, theta, rescale, places, settings, inverse)


@torch.library.custom_op("flowtrain::affine_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    x: Tensor,
    theta: Tensor,
    rescale: Tensor | None,
    grad_y: Tensor,
    grad_log_det: Tensor,
    places: Tensor | None,
    settings: list[float],
    inverse: bool,
) -> list[Tensor]:
    found = _backward(x, theta, rescale, grad_y, grad_log_det, places, settings, inverse)
    return [one.contiguous() for one in found]


@_operator.register_fake
def _(x, theta, rescale, places, settings, inverse):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


@_operator_backward.register_fake
def _(x, theta, rescale, grad_y, grad_log_det, places, settings, inverse):
    return [one.new_empty(one.shape) for one in (x, theta, rescale) if one is not None]


def _setup(ctx, inputs, output):
    x, theta, rescale, *ctx.rest = inputs
    ctx.save_for_backward(x, theta, rescale)


def _gradients(ctx, *grads):
    found = _operator_backward(*ctx.saved_tensors, *grads, *ctx.rest)
    return *found, *[None] * (6 - len(found))


_operator.register_autograd(_gradients, setup_context=_setup)
