"""Fully connected networks of rectified units as one C++ function, and one for its gradients."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.runtime import gradients, native

SOURCE = Path(__file__).with_suffix(".cpp")
ROWS, WIDTH = 64, 16  # of a block, and numbers to which its rows are padded, as in the C++ file
MOST = 1 << 17  # weights: the products of larger networks are faster by torch


class Kind(NamedTuple):
    """What a layer does besides its product.

    Attributes:
        rectifies: the numbers that it is given.
        skips: it ends a residual block: the output of the layer before the last one is added to its own.
    """

    rectifies: bool = False
    skips: bool = False


def dense(x: Tensor, kinds: Sequence[Kind], tensors: Sequence[Tensor]) -> Tensor | None:
    """The output (B, out) of linear layers in turn, given x (B, in); None where C++ does not apply.

    Args:
        kinds: of the layers.
        tensors: their weights (out, in) and biases (out,), in turn.
    """
    if x.dim() != 2 or sum(map(Tensor.numel, tensors)) > MOST:
        return None
    if not native.applies(x, *tensors) or torch.is_autocast_enabled("cpu") or native.load(SOURCE) is None:
        return None
    if any(one.dtype != x.dtype or not one.is_contiguous() for one in tensors):
        return None
    return _Dense.apply(x, kinds, *tensors)


def _by_torch(x: Tensor, kinds: Sequence[Kind], tensors: Sequence[Tensor]) -> Tensor:
    """The same by torch's operations, for derivatives of gradients."""
    before, z = x, x
    for kind, weight, bias in zip(kinds, tensors[::2], tensors[1::2]):
        found = F.linear(F.relu(z) if kind.rectifies else z, weight, bias)
        before, z = z, before + found if kind.skips else found
    return z


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kinds, *tensors):
        ctx.kinds, given, x = kinds, x, x.contiguous()
        blocks, work = -(-x.shape[0] // ROWS), sum(map(Tensor.numel, tensors))
        kept = None
        if any(ctx.needs_input_grad):  # the outputs of all layers but the last
            kept = x.new_empty(blocks * ROWS * sum(-(-bias.shape[0] // WIDTH) * WIDTH for bias in tensors[1:-1:2]))
        y, ctx.parts = x.new_empty(x.shape[0], tensors[-1].shape[0]), min(blocks, native.parts(x.shape[0], work)) or 1
        pointers = x.data_ptr(), y.data_ptr(), 0 if kept is None else kept.data_ptr()
        _function("forward", x.dtype)(*pointers, x.shape[0], ctx.parts, _table(kinds, tensors), len(kinds))
        ctx.save_for_backward(given, kept, *tensors)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, kept, *tensors = ctx.saved_tensors
        if not gradients.in_place(grad):
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
            found = gradients.by_autograd(lambda: [_by_torch(x, ctx.kinds, tensors)], (x, *tensors), needed, [grad])
            return found[0], None, *found[1:]
        x, grad = x.contiguous(), grad.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums = x.new_empty(ctx.parts, sum(map(Tensor.numel, tensors)))
        starts = range(sums.data_ptr(), sums.data_ptr() + sums.nbytes, sums.nbytes // ctx.parts)
        tables = b"".join(_table(ctx.kinds, tensors, start) for start in starts)
        pointers = x.data_ptr(), grad.data_ptr(), 0 if grad_x is None else grad_x.data_ptr(), kept.data_ptr()
        _function("backward", x.dtype)(*pointers, x.shape[0], ctx.parts, tables, len(ctx.kinds))
        found = sums[0] if ctx.parts == 1 else sums.sum(0)
        return grad_x, None, *torch._C._nn.unflatten_dense_tensors(found, tensors)


def _table(kinds: Sequence[Kind], tensors: Sequence[Tensor], to: int = 0) -> bytes:
    """The layers as C++ reads them. Their gradients go to memory from ``to`` on, one after the other."""
    numbers: list[int] = []
    for kind, weight, bias in zip(kinds, tensors[::2], tensors[1::2]):
        outputs, inputs = weight.shape
        of_bias = to and to + weight.nbytes
        numbers += inputs, outputs, *kind, weight.data_ptr(), bias.data_ptr(), to, of_bias
        to = of_bias and of_bias + bias.nbytes
    return struct.pack(f"{len(numbers)}q", *numbers)


@cache
def _function(name: str, dtype: torch.dtype) -> Callable:
    # the tensors' places, the rows and the parts of their blocks, the layers and their number
    tensors = {"forward": 3, "backward": 4}[name]
    types = *[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 2, ctypes.c_char_p, ctypes.c_int64
    return native.function(SOURCE, name, dtype, types)
