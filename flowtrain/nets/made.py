"""Masked networks, the conditioners of autoregressive maps (Germain et al. 2015, section 4).

A unit of degree d depends on the first d elements of x and on no others. Inputs and outputs are units too: the element
at index i, counted from 0, has degree i + 1, and row i of the output, which holds that element's parameters, has degree
i. Hidden units have degrees from 1 to D − 1, or from 0 if there is a context. The mask keeps the weight from a unit to
one of the next layer where the first has no greater degree than the second. :class:`MADE` shows the masks for D = 3.

Each layer's units are sorted by degree, so masks are block-triangular and the network can also be run in steps. A step
computes the units of one degree d, in every layer, once the first d elements are known. So an inverse computes each
unit once. If no hidden unit has degree d + 1, row d + 1 needs no more hidden units than row d, and the same step
computes both rows.
"""

from __future__ import annotations

import math
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.initial import small_init, zero_init
from flowtrain.nets.mlp import called_as_one, check_at_least_one, context_layer
from flowtrain.nets.norm import Dropout
from flowtrain.runtime import gradients, native
from flowtrain.runtime.dense import applies, dense, kinds_of_mlp, kinds_of_residual_mlp

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh}


class _Staircase(torch.autograd.Function):
    """x·(weight·mask)ᵀ + bias, where each block of rows of the mask is zero from some column on: blocks of sizes
    ``rows``, zero from ``columns`` on.

    The blocks' products are written to their places. Autograd would copy them, and pad the gradients of each.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mask, rows, columns):
        masked, out, top = weight * mask, x.new_empty(x.shape[0], len(weight)), 0
        for size, right in zip(rows, columns):
            block = slice(top, top + size)
            torch.addmm(bias[block], x[:, :right], masked[block, :right].T, out=out[:, block])
            top += size
        ctx.save_for_backward(x, weight, masked, mask)
        ctx.blocks = rows, columns
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, masked, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        if not gradients.in_place(grad):
            grad_x = grad @ (weight * mask) if needed else None
            return grad_x, (grad.T @ x) * mask, grad.sum(0), None, None, None
        grad_weight, grad_x = torch.empty_like(masked), torch.empty_like(x) if needed else None
        top = left = 0
        for size, right in zip(*ctx.blocks):
            block, seen = slice(top, top + size), slice(left, right)
            torch.mm(grad[:, block].T, x[:, :right], out=grad_weight[block, :right])
            grad_weight[block, right:] = 0
            if needed:
                torch.mm(grad[:, top:], masked[top:, seen], out=grad_x[:, seen])
            top, left = top + size, right
        if needed:
            grad_x[:, left:] = 0
        return grad_x, grad_weight.mul_(mask), grad.sum(0), None, None, None


class _CompiledStaircase(torch.autograd.Function):
    """:class:`_Staircase` of a masked weight, in operations that torch.compile can trace."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows, columns):
        ctx.save_for_backward(x, weight)
        ctx.blocks = rows, columns
        parts = zip(weight.split(rows), bias.split(rows), columns)
        return torch.cat([torch.addmm(b, x[:, :right], w[:, :right].T) for w, b, right in parts], 1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        grad_weight, grad_x = grad.new_zeros(weight.shape), []
        top = left = 0
        for size, right in zip(*ctx.blocks):
            grad_weight[top : top + size, :right] = grad[:, top : top + size].T @ x[:, :right]
            if needed:
                grad_x.append(grad[:, top:] @ weight[top:, left:right])
            top, left = top + size, right
        unseen = x.new_zeros(x.shape[0], x.shape[1] - left)
        return torch.cat([*grad_x, unseen], 1) if needed else None, grad_weight, grad.sum(0), None, None


class MaskedLinear(nn.Linear):
    """A linear layer whose outputs see the inputs whose degree is not greater than their own. Degrees ascend.

    The mask is a staircase. The product is computed in a few blocks of outputs, each without the inputs that none of
    its outputs sees.
    """

    blocks, narrow = 4, 64  # a narrower block costs more than it saves
    mask: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(outputs, inputs), persistent=False)

    def connect(self, before: Tensor, after: Tensor, steps: Tensor) -> None:
        """Set the mask from the degrees of the inputs and of the outputs, and the number of outputs of each step.
        ``steps`` holds the degree at which each step but the first begins."""
        self.mask.copy_(before <= after[:, None])
        self.sizes = torch.bincount(torch.bucketize(after, steps, right=True), minlength=len(steps) + 1).tolist()
        count = max(1, min(self.blocks, min(self.mask.shape) // self.narrow))
        blocks = after.split(_align(len(after) / count))
        self.rows = [len(block) for block in blocks]
        self.columns = [min(_align(int((before <= block[-1]).sum())), len(before)) for block in blocks]

    def forward(self, x):
        # elsewhere it costs more to start a product than to do it
        if len(self.rows) == 1 or (device := x.device.type) != "cpu":
            return F.linear(x, self.weight * self.mask, self.bias)
        weight, bias, mask = self.weight, self.bias, self.mask
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x, weight, bias, mask = (part.to(torch.get_autocast_dtype(device)) for part in (x, weight, bias, mask))
        if torch.compiler.is_compiling():
            return _CompiledStaircase.apply(x, weight * mask, bias, self.rows, self.columns)
        if native.in_memory(x, weight, bias):
            return _Staircase.apply(x, weight, bias, mask, self.rows, self.columns)
        return F.linear(x, weight * mask, bias)


class _StepwiseLinear:
    """A masked layer run in steps: a call takes the new inputs of a step, (B, n), and returns its new outputs, (B, m).

    Steps are grouped in chunks. One product applies the inputs before a chunk to all of its outputs, so that a step
    only adds the few inputs inside its chunk. Inputs are stored in rows, (n, B), so that those so far are one block of
    memory. Where gradients are needed, rows are not overwritten.
    """

    width = 64  # inputs inside a chunk

    def __init__(self, layer: MaskedLinear, batch: int):
        self.layer = layer
        self.weights = layer.weight.split(layer.sizes)
        self.grows = torch.is_grad_enabled()
        self.rows = layer.weight.new_empty(0 if self.grows else layer.in_features, batch)
        self.chunk = max(1, self.width * len(layer.sizes) // layer.in_features)
        if torch.is_autocast_enabled(self.rows.device.type):
            self.chunk = 1  # a sum in lower precision is rounded once, as in the forward pass
        self.step = self.outputs = self.before = self.inputs = 0

    def __call__(self, x):
        step, start = self.step, self.inputs
        self.step, self.inputs = step + 1, start + x.shape[1]
        if self.grows:
            self.rows = torch.cat((self.rows, x.T))
        else:
            self.rows[start : self.inputs] = x.T
        if step % self.chunk == 0:
            self._start_chunk(self.layer.sizes[step : step + self.chunk])
            return self.partial[0].T
        inside = slice(self.before, self.inputs)
        return torch.addmm(self.partial[step % self.chunk], self.weights[step][:, inside], self.rows[inside]).T

    def _start_chunk(self, sizes):
        """Compute what the inputs so far contribute to the outputs of a chunk."""
        outputs = slice(self.outputs, self.outputs + sum(sizes))
        weight, bias = self.layer.weight[outputs, : self.inputs], self.layer.bias[outputs, None]
        self.partial = torch.addmm(bias, weight, self.rows[: self.inputs]).split(sizes)
        self.outputs, self.before = outputs.stop, self.inputs


class _Masked(nn.Module):
    """``depth`` masked hidden layers of units of the same degrees, run at once or in steps."""

    degrees: Tensor
    kinds: tuple[int, ...]  # of its layers
    numbers = 1  # by which the network sees an element

    def __init__(self, shape, out, hidden, depth, degrees, activation, dropout, context_shape):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"a masked network takes vectors, not {list(shape)}; flatten first")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation='{activation}' must be {' or '.join(ACTIVATIONS)}")
        check_at_least_one(hidden=hidden)
        (self.dimensions,), self.out = shape, out
        # units of degree 0 see the context alone; without one they are constants, which only D = 1 needs
        least = 0 if context_shape is not None or self.dimensions == 1 else 1
        self.register_buffer("degrees", degrees_of(hidden, least, self.dimensions - 1, degrees), degrees == "random")
        widths = [self.numbers * self.dimensions, *[hidden] * depth, self.dimensions * out]
        self.linears = nn.ModuleList(MaskedLinear(*pair) for pair in zip(widths, widths[1:]))
        zero_init(self.linears[-1])
        self.context = context_layer(hidden, context_shape)
        self.activation, self.dropout = ACTIVATIONS[activation], Dropout(dropout)
        self._connect()
        self.register_load_state_dict_post_hook(_reconnect)

    def _connect(self):
        elements = torch.arange(1, self.dimensions + 1, device="cpu").repeat_interleave(self.numbers)
        rows = torch.arange(self.dimensions, device="cpu").repeat_interleave(self.out)
        hidden = self.degrees.cpu()
        degrees = [elements, *[hidden] * (len(self.linears) - 1), rows]
        for linear, before, after in zip(self.linears, degrees, degrees[1:]):
            linear.connect(before, after, hidden[hidden > 0].unique())

    def forward(self, x, context=None):
        """(B, D) -> (B, D, out), row i a function of the elements before i."""
        context = None if self.context is None else self.context(context)
        return self._by_element(self._network(self._see(x), self.linears, context))

    def init_cache(self, x: Tensor, context: Tensor | None = None):
        """An empty activation cache for a pass over the elements of a batch like x (B, D)."""
        linears = [_StepwiseLinear(linear, x.shape[0]) for linear in self.linears]
        if self.context is None:
            return linears, repeat(None)
        return linears, iter(self.context(context).split(self.linears[0].sizes, 1))

    def step(self, x: Tensor, cache) -> Tensor:
        """The rows of the next m elements, (B, m, out), given the newest ones, (B, n), or none, (B, 0); extends
        ``cache``."""
        linears, contexts = cache
        return self._by_element(self._network(self._see(x), linears, next(contexts)))

    def _by_element(self, h):
        """(B, m·out) as (B, m, out); several times as fast as unflatten."""
        return h.reshape(h.shape[0], h.shape[1] // self.out, self.out)

    def _see(self, x):
        """What the network sees of elements x (B, n): (B, n·numbers)."""
        return x

    def _by_cpp(self, h, linears, context):
        """The network by one C++ function; None where that does not apply."""
        plain = h.is_cpu and linears is self.linears and context is None and self.activation is F.relu
        if not plain or not called_as_one(linears, MaskedLinear, self.dropout):
            return None
        if not applies(h, [one for linear in linears for one in (linear.weight, linear.bias)]):
            return None
        return dense(h, self.kinds, [one for linear in linears for one in (linear.weight * linear.mask, linear.bias)])

    def _network(self, h, linears, context):
        """The network; each of ``linears`` computes all units of its layer, or the new ones of a step."""
        raise NotImplementedError


def _reconnect(module: _Masked, _keys) -> None:
    module._connect()


class MADE(_Masked):
    """(B, D) -> (B, D, out), row i a function of the elements before i: a fully connected masked network (Germain et
    al. 2015).

    Args:
        shape: (D,).
        out: parameters per element.
        hidden: units of each hidden layer.
        depth: number of hidden layers.
        degrees: of hidden units: spread evenly ("sequential") or drawn by the constructor ("random"). With a context
            they start at 0, so that the parameters of the first element depend on it too.
        activation: "relu" or "tanh".
        dropout: probability, after each hidden layer.
        context_shape: (C,), or None. A linear map of the context is added to the first hidden layer.

    Raises:
        ValueError: ``shape`` is not a vector's, a size below 1, or an unknown name.

    >>> MADE((6,), out=2)(torch.randn(5, 6)).shape
    torch.Size([5, 6, 2])

    The masks for D = 3: the hidden units have degrees 1, 1, 2, 2. The first two see element 0, the others see
    elements 0 and 1. Row 0 of the output sees none of them, row 1 the first two, row 2 all.

    >>> net = MADE((3,), out=1, hidden=4, depth=1)
    >>> net.linears[0].mask.int().tolist()
    [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    >>> net.linears[1].mask.int().tolist()
    [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 64,
        depth: int = 2,
        degrees: str = "sequential",
        activation: str = "relu",
        dropout: float = 0.0,
        context_shape=None,
    ):
        check_at_least_one(depth=depth)
        super().__init__(shape, out, hidden, depth, degrees, activation, dropout, context_shape)
        self.kinds = kinds_of_mlp(depth)

    def _network(self, h, linears, context):
        if (found := self._by_cpp(h, linears, context)) is not None:
            return found
        first, *others = linears
        h = _add(first(h), context)
        for linear in others:
            h = linear(self.dropout(self.activation(h)))
        return h


class CircularMADE(MADE):
    """A :class:`MADE` of points on circles of length 1, which it sees by sine and cosine: x and x + 1 are one point.

    >>> CircularMADE((6,), out=2)(torch.randn(5, 6)).shape
    torch.Size([5, 6, 2])
    """

    numbers = 2

    def _see(self, x):
        angle = 2 * math.pi * x
        return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)


class ResidualMADE(_Masked):
    """(B, D) -> (B, D, out): ``blocks`` pre-activated residual blocks of two masked layers (Durkan et al. 2019,
    appendix B.1). The other arguments are those of :class:`MADE`.

    >>> ResidualMADE((6,), out=2)(torch.randn(5, 6)).shape
    torch.Size([5, 6, 2])
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 64,
        blocks: int = 2,
        degrees: str = "sequential",
        activation: str = "relu",
        dropout: float = 0.0,
        context_shape=None,
    ):
        check_at_least_one(blocks=blocks)
        super().__init__(shape, out, hidden, 1 + 2 * blocks, degrees, activation, dropout, context_shape)
        for linear in self.linears[2:-1:2]:
            small_init(linear)
        self.kinds = kinds_of_residual_mlp(blocks)

    def _network(self, h, linears, context):
        if (found := self._by_cpp(h, linears, context)) is not None:
            return found
        first, *inner, last = linears
        h = _add(first(h), context)
        for one, other in zip(inner[::2], inner[1::2]):
            h = h + other(self.dropout(self.activation(one(self.activation(h)))))
        return last(h)


def _align(units: float) -> int:
    """``units`` rounded up to a multiple of the numbers in a vector register, along which products are fast."""
    return 16 * math.ceil(units / 16)


def _add(h: Tensor, context: Tensor | None) -> Tensor:
    return h if context is None else h + context


def degrees_of(units: int, least: int, most: int, how: str) -> Tensor:
    """Degrees from ``least`` to ``most`` of ``units`` units, ascending: spread evenly ("sequential") or "random"."""
    count = most - least + 1
    if how == "sequential" and units < count:
        return torch.linspace(least, most, units, device="cpu").round().long()
    if how == "sequential":
        return least + torch.arange(units, device="cpu") * count // units
    if how == "random":
        return torch.randint(least, most + 1, (units,), device="cpu").sort().values
    raise ValueError(f"degrees='{how}' must be sequential or random")
