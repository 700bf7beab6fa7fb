"""Fully connected networks of rectified units as one C++ function, and one for its gradients."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
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


# the tensors' places, the rows and the parts of their blocks, the layers and their number
_FORWARD, _BACKWARD = (
    (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 2, ctypes.c_char_p, ctypes.c_int64) for tensors in (3, 4)
)


def kinds_of_mlp(depth: int) -> tuple[Kind, ...]:
    """Those of the layers of a network with ``depth`` hidden ones."""
    return Kind(), *[Kind(rectifies=True)] * depth


def kinds_of_residual_mlp(blocks: int) -> tuple[Kind, ...]:
    """Those of the layers of a network of residual blocks, with a linear layer before and after them."""
    return Kind(), *[Kind(rectifies=True), Kind(rectifies=True, skips=True)] * blocks, Kind()


def dense(x: Tensor, kinds: Sequence[Kind], tensors: Sequence[Tensor]) -> Tensor:
    """The output (B, out) of linear layers in turn, given x (B, in), where C++ :func:`applies`.

    Args:
        kinds: of the layers.
        tensors: their weights (out, in) and biases (out,), in turn.
    """
    return _Dense.apply(x, kinds, *tensors)


def applies(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether C++ may compute a network of these weights and biases for x."""
    if x.dim() != 2 or x.dtype not in native.NAMES or not native.in_memory(x, *tensors):
        return False
    for one in tensors:
        if one.dtype != x.dtype or not one.is_contiguous():
            return False
    may = sum(map(Tensor.numel, tensors)) <= MOST and not torch.is_autocast_enabled("cpu")
    return may and native.load(SOURCE) is not None


def by_torch(x: Tensor, kinds: Sequence[Kind], tensors: Sequence[Tensor]) -> Tensor:
    """The network by torch's operations, for derivatives of gradients."""
    before, z = x, x
    for kind, weight, bias in zip(kinds, tensors[::2], tensors[1::2]):
        found = F.linear(F.relu(z) if kind.rectifies else z, weight, bias)
        before, z = z, before + found if kind.skips else found
    return z


def forward(x: Tensor, kinds: Sequence[Kind], tensors: Sequence[Tensor], keeps: bool) -> tuple[Tensor, Tensor | None]:
    """The network's output for a contiguous x, and what :func:`backward` needs, if it ``keeps`` that."""
    rows, kept = x.shape[0], None
    if keeps:  # the outputs of all layers but the last
        width = sum(-(-bias.shape[0] // WIDTH) * WIDTH for bias in tensors[1:-1:2])
        kept = x.new_empty(_blocks(rows) * ROWS * width)
    y = x.new_empty(rows, tensors[-1].shape[0])
    pointers = x.data_ptr(), y.data_ptr(), native.pointer(kept)
    native.function(SOURCE, "forward", x.dtype, _FORWARD)(
        *pointers, rows, _parts(rows, tensors), _table(kinds, tensors), len(kinds)
    )
    return y, kept


def backward(
    x: Tensor, kept: Tensor, grad: Tensor, kinds: Sequence[Kind], tensors: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The gradients of a contiguous x, if that is needed, and of ``tensors``, given that of the output, contiguous."""
    grad_x, parts = torch.empty_like(x) if needs_x else None, _parts(x.shape[0], tensors)
    sums = x.new_empty(parts, sum(map(Tensor.numel, tensors)))
    starts = range(sums.data_ptr(), sums.data_ptr() + sums.nbytes, sums.nbytes // parts)
    tables = b"".join(_table(kinds, tensors, start) for start in starts)
    pointers = x.data_ptr(), grad.data_ptr(), native.pointer(grad_x), kept.data_ptr()
    function = native.function(SOURCE, "backward", x.dtype, _BACKWARD)
    function(*pointers, x.shape[0], parts, tables, len(kinds))
    return grad_x, torch._C._nn.unflatten_dense_tensors(sums[0] if parts == 1 else sums.sum(0), tensors)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kinds, *tensors):
        y, kept = forward(x.contiguous(), kinds, tensors, any(ctx.needs_input_grad))
        ctx.save_for_backward(x, kept, *tensors)
        ctx.kinds = kinds
        return y

    @staticmethod
    def backward(ctx, grad):
        x, kept, *tensors = ctx.saved_tensors
        if gradients.in_place(grad):
            needs_x = ctx.needs_input_grad[0]
            grad_x, grads = backward(x.contiguous(), kept, grad.contiguous(), ctx.kinds, tensors, needs_x)
        else:
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
            found = gradients.by_autograd(lambda: [by_torch(x, ctx.kinds, tensors)], (x, *tensors), needed, [grad])
            grad_x, *grads = found
        return grad_x, None, *grads


def _blocks(rows: int) -> int:
    return -(-rows // ROWS)


def _parts(rows: int, tensors: Sequence[Tensor]) -> int:
    return max(1, min(_blocks(rows), native.parts(rows, sum(map(Tensor.numel, tensors)))))


def _table(kinds: Sequence[Kind], tensors: Sequence[Tensor], to: int = 0) -> bytes:
    """The layers as C++ reads them. Their gradients go to memory from ``to`` on, one after the other."""
    numbers: list[int] = []
    for kind, weight, bias in zip(kinds, tensors[::2], tensors[1::2]):
        outputs, inputs = weight.shape
        of_bias = to and to + weight.nbytes
        numbers += inputs, outputs, *kind, weight.data_ptr(), bias.data_ptr(), to, of_bias
        to = of_bias and of_bias + bias.nbytes
    return struct.pack(f"{len(numbers)}q", *numbers)
