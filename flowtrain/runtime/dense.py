"""Fully connected networks of rectified units as one C++ function, and one for its gradients."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.runtime import gradients, native

SOURCE = Path(__file__).with_suffix(".cpp")
ROWS, WIDTH = 64, 16  # of a block, and numbers to which its rows are padded, as in the C++ file
MOST = 1 << 17  # weights: the products of larger networks are faster by torch


# bits of the kind of a layer: what it does besides its product
RECTIFIES = 1  # it rectifies its input
SKIPS = 2  # it ends a residual block of two layers, and adds the block's input

# the tensors' places, the rows and the parts of their blocks, the layers and their number
_FORWARD, _BACKWARD = (
    (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 2, ctypes.c_char_p, ctypes.c_int64) for tensors in (3, 4)
)


def kinds_of_mlp(depth: int) -> tuple[int, ...]:
    """Those of the layers of a network with ``depth`` hidden ones."""
    return 0, *[RECTIFIES] * depth


def kinds_of_residual_mlp(blocks: int) -> tuple[int, ...]:
    """Those of the layers of a network of residual blocks, with a linear layer before and after them."""
    return 0, *[RECTIFIES, RECTIFIES | SKIPS] * blocks, 0


def dense(x: Tensor, kinds: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    """The output (B, out) of linear layers in turn, given x (B, in), where C++ :func:`applies`.

    Args:
        kinds: of the layers.
        tensors: their weights (out, in) and biases (out,), in turn.
    """
    if torch.compiler.is_compiling():
        return _operator(x, tensors, list(kinds))[0]
    return _Dense.apply(x, kinds, *tensors)


def applies(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether C++ may compute a network of these weights and biases for x."""
    if x.dim() != 2 or x.dtype not in native.NAMES:
        return False
    if not (native.as_operator(x) or native.in_memory(x, *tensors)):
        return False
    for one in tensors:
        if one.dtype != x.dtype or not one.is_contiguous():
            return False
    weights = sum([one.numel() for one in tensors])
    return weights <= MOST and not torch.is_autocast_enabled("cpu") and is_built()


@native.constant_when_compiled
def is_built() -> bool:
    """Whether there are C++ functions of networks."""
    return native.load(SOURCE) is not None


def by_torch(x: Tensor, kinds: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    """The network by torch's operations, for derivatives of gradients."""
    before, z = x, x
    for kind, weight, bias in zip(kinds, tensors[::2], tensors[1::2]):
        found = F.linear(F.relu(z) if kind & RECTIFIES else z, weight, bias)
        before, z = z, before + found if kind & SKIPS else found
    return z


def forward(x: Tensor, kinds: Sequence[int], tensors: Sequence[Tensor], keeps: bool) -> tuple[Tensor, Tensor]:
    """The network's output for a contiguous x, and what :func:`backward` needs, nothing unless it ``keeps`` that."""
    rows = x.shape[0]
    kept = x.new_empty(_kept(rows, tensors) if keeps else 0)
    y = x.new_empty(rows, tensors[-1].shape[0])
    pointers = x.data_ptr(), y.data_ptr(), kept.data_ptr()
    native.function(SOURCE, "forward", x.dtype, _FORWARD)(
        *pointers, rows, _parts(rows, tensors), _table(kinds, tensors), len(kinds)
    )
    return y, kept


def backward(
    x: Tensor, kept: Tensor, grad: Tensor, kinds: Sequence[int], tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of a contiguous x, and of ``tensors`` as one vector, given that of the output, contiguous."""
    grad_x, parts = torch.empty_like(x), _parts(x.shape[0], tensors)
    sums = x.new_empty(parts, sum(map(Tensor.numel, tensors)))
    starts = range(sums.data_ptr(), sums.data_ptr() + sums.nbytes, sums.nbytes // parts)
    tables = b"".join(_table(kinds, tensors, start) for start in starts)
    pointers = x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), kept.data_ptr()
    function = native.function(SOURCE, "backward", x.dtype, _BACKWARD)
    function(*pointers, x.shape[0], parts, tables, len(kinds))
    return grad_x, sums.view(-1) if parts == 1 else sums.sum(0)


def as_tensors(grads: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of ``tensors`` from one vector of them."""
    return torch._C._nn.unflatten_dense_tensors(grads, tensors)


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
            grad_x, grads = backward(x.contiguous(), kept, grad.contiguous(), ctx.kinds, tensors)
            return grad_x, None, *as_tensors(grads, tensors)
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        found = gradients.by_autograd(lambda: [by_torch(x, ctx.kinds, tensors)], (x, *tensors), needed, [grad])
        return found[0], None, *found[1:]


def _blocks(rows: int) -> int:
    return -(-rows // ROWS)


def _kept(rows: int, tensors: Sequence[Tensor]) -> int:
    """The numbers that a gradient needs: the outputs of all layers but the last."""
    return _blocks(rows) * ROWS * sum([-(-bias.shape[0] // WIDTH) * WIDTH for bias in tensors[1:-1:2]])


def _parts(rows: int, tensors: Sequence[Tensor]) -> int:
    return max(1, min(_blocks(rows), native.parts(rows, sum(map(Tensor.numel, tensors)))))


def _table(kinds: Sequence[int], tensors: Sequence[Tensor], to: int = 0) -> bytes:
    """The layers as C++ reads them. Their gradients go to memory from ``to`` on, one after the other."""
    numbers: list[int] = []
    for kind, weight, bias in zip(kinds, tensors[::2], tensors[1::2]):
        outputs, inputs = weight.shape
        of_bias = to and to + weight.nbytes
        numbers += inputs, outputs, kind & RECTIFIES, kind & SKIPS, weight.data_ptr(), bias.data_ptr(), to, of_bias
        to = of_bias and of_bias + bias.nbytes
    return struct.pack(f"{len(numbers)}q", *numbers)


# ---- for torch.compile, an operator with a gradient; in eager mode the function above costs less


@torch.library.custom_op("flowtrain::dense", mutates_args=(), device_types="cpu")
def _operator(x: Tensor, tensors: list[Tensor], kinds: list[int]) -> tuple[Tensor, Tensor]:
    return forward(x.contiguous(), kinds, tensors, True)


@torch.library.custom_op("flowtrain::dense_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    x: Tensor, kept: Tensor, grad: Tensor, tensors: list[Tensor], kinds: list[int]
) -> tuple[Tensor, Tensor]:
    return backward(x.contiguous(), kept, grad.contiguous(), kinds, tensors)


@_operator.register_fake
def like_forward(x, tensors, kinds):
    """Tensors like the results of :func:`forward`, which keeps what :func:`backward` needs."""
    return x.new_empty(x.shape[0], tensors[-1].shape[0]), x.new_empty(_kept(x.shape[0], tensors))


@_operator_backward.register_fake
def like_backward(x, kept, grad, tensors, kinds):
    """Tensors like the results of :func:`backward`."""
    return x.new_empty(x.shape), x.new_empty(sum([one.numel() for one in tensors]))


def _setup(ctx, inputs, output):
    x, tensors, ctx.kinds = inputs
    ctx.save_for_backward(x, output[1], *tensors)


def _gradients(ctx, grad, _):
    x, kept, *tensors = ctx.saved_tensors
    grad_x, grads = _operator_backward(x, kept, grad, tensors, ctx.kinds)
    return grad_x, parts_of(grads, tensors), None


def parts_of(grads: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`as_tensors` by operations that a compiler knows."""
    parts = grads.split([one.numel() for one in tensors])
    return [part.view(one.shape) for part, one in zip(parts, tensors)]


_operator.register_autograd(_gradients, setup_context=_setup)
