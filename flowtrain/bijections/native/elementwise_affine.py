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
    if not native.applies(*given) or native.load(SOURCE) is None:
        return None
    if x.dim() != 2 or theta.dim() != 3 or theta.shape[0] != x.shape[0]:  # torch broadcasts
        return None
    if x.dtype != theta.dtype or rescale is not None and rescale.dtype != x.dtype:
        return None
    return _AffineElements.apply(x, theta, rescale, places, settings, inverse, by_torch)


class _AffineElements(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, rescale, places, settings, inverse, by_torch):
        ctx.save_for_backward(x, theta, rescale)
        ctx.rest = places, settings, inverse, by_torch
        x = x.contiguous()
        y, log_det = torch.empty_like(x), x.new_empty(x.shape[0])
        pointers = [native.pointer(one) for one in (x, theta, rescale, y, log_det)]
        native.function(SOURCE, "forward", x.dtype, _FORWARD)(
            *pointers, x.shape[0], _parts(theta), _layout(x, theta, places), struct.pack("4d", *settings), inverse
        )
        return y, log_det

    @staticmethod
    def backward(ctx, *grads):
        x, theta, rescale = ctx.saved_tensors
        places, settings, inverse, by_torch = ctx.rest
        if not gradients.in_place(*grads):
            given = [one for one in (x, theta, rescale) if one is not None]
            needed = ctx.needs_input_grad[: len(given)]
            found = gradients.by_autograd(lambda: by_torch(x, theta), given, needed, grads)
            return *found, *[None] * (7 - len(found))
        x, grads, grad_theta = x.contiguous(), [one.contiguous() for one in grads], torch.empty_like(theta)
        if grad_theta.stride() != theta.stride():  # a part of a larger tensor, or rows share it
            theta = theta.contiguous()
            grad_theta = torch.empty_like(theta)
        parts, grad_x = _parts(theta), torch.empty_like(x)
        sums = None if rescale is None else x.new_zeros(parts, theta.shape[1])
        pointers = [native.pointer(one) for one in (x, theta, rescale, *grads, grad_x, grad_theta, sums)]
        native.function(SOURCE, "backward", x.dtype, _BACKWARD)(
            *pointers, x.shape[0], parts, _layout(x, theta, places), struct.pack("4d", *settings), inverse
        )
        return grad_x, grad_theta, None if sums is None else sums.sum(0), None, None, None, None


def _parts(theta: Tensor) -> int:
    return native.parts(theta.shape[0], WORK * theta.shape[1])


def _layout(x: Tensor, theta: Tensor, places: Tensor | None) -> bytes:
    return struct.pack("6q", x.shape[1], theta.shape[1], native.pointer(places), *theta.stride())
