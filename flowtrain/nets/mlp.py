"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.initial import small_init, zero_init
from flowtrain.nets.norm import Dropout
from flowtrain.runtime import fusion
from flowtrain.runtime.dense import applies, dense, kinds_of_mlp, kinds_of_residual_mlp


class MLP(nn.Module):
    """(B, n) -> (B, out): ``depth`` hidden layers of ``hidden`` rectified units.

    A linear map of the context vector, if there is one, is added to the first hidden layer.

    Raises:
        ValueError: ``shape`` is not a vector's, a size is below 1, or ``dropout`` is outside [0, 1).

    >>> import torch
    >>> MLP((3,), out=4)(torch.randn(5, 3)).shape
    torch.Size([5, 4])
    """

    def __init__(self, shape, out: int, hidden: int = 256, depth: int = 2, dropout: float = 0.0, context_shape=None):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"an MLP takes vectors, not {list(shape)}; flatten first")
        check_at_least_one(hidden=hidden, depth=depth)
        self.first = nn.Linear(shape[0], hidden)
        self.context = context_layer(hidden, context_shape)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.dropout = Dropout(dropout)
        self.last = zero_init(nn.Linear(hidden, out))
        self.kinds = kinds_of_mlp(depth)

    def forward(self, x, context=None):
        if (found := by_cpp(self, x, context)) is not None:
            return found
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(context)
        for layer in self.hidden:
            h = layer(F.relu(self.dropout(h)))
        return self.last(F.relu(self.dropout(h)))

    def dense_layers(self) -> Layers | None:
        """The layers as one function has them; None where they are to be called one by one."""
        return layers_of(self, [self.first, *self.hidden, self.last])


class ResidualMLP(nn.Module):
    """(B, n) -> (B, out): ``blocks`` pre-activated residual blocks of two layers of ``hidden`` rectified units (Durkan
    et al. 2019, appendix B.1).

    A linear map of the context vector, if there is one, is added to the first hidden layer.

    Raises:
        ValueError: ``shape`` is not a vector's, a size is below 1, or ``dropout`` is outside [0, 1).

    >>> import torch
    >>> ResidualMLP((3,), out=4, context_shape=(2,))(torch.randn(5, 3), torch.randn(5, 2)).shape
    torch.Size([5, 4])
    """

    def __init__(self, shape, out: int, hidden: int = 64, blocks: int = 2, dropout: float = 0.0, context_shape=None):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"a ResidualMLP takes vectors, not {list(shape)}; flatten first")
        check_at_least_one(hidden=hidden, blocks=blocks)
        self.first = nn.Linear(shape[0], hidden)
        self.context = context_layer(hidden, context_shape)
        self.ones = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.others = nn.ModuleList(small_init(nn.Linear(hidden, hidden)) for _ in range(blocks))
        self.dropout = Dropout(dropout)
        self.last = zero_init(nn.Linear(hidden, out))
        self.kinds = kinds_of_residual_mlp(blocks)

    def forward(self, x, context=None):
        if (found := by_cpp(self, x, context)) is not None:
            return found
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(context)
        for one, other in zip(self.ones, self.others):
            h = h + other(F.relu(self.dropout(one(F.relu(h)))))
        return self.last(h)

    def dense_layers(self) -> Layers | None:
        """The layers as one function has them; None where they are to be called one by one."""
        inner = chain.from_iterable(zip(self.ones, self.others))
        return layers_of(self, [self.first, *inner, self.last])  # type: ignore[list-item]


Layers = tuple[Sequence[int], list[Tensor]]  # of each layer its kind, and its weight and bias in turn


def layers_of(net: MLP | ResidualMLP, linears: Sequence[nn.Linear]) -> Layers | None:
    """Those of ``net``; None where they are to be called one by one."""
    if not called_as_one(linears, nn.Linear, net.dropout):
        return None
    return net.kinds, [tensor for linear in linears for tensor in (linear.weight, linear.bias)]


def called_as_one(linears: Iterable[nn.Linear], kind: type[nn.Linear], dropout: Dropout) -> bool:
    """Whether one function may take the place of ``linears``: each is a plain layer of its ``kind``, none of their
    units are dropped, and no hook is to see them."""
    drops = dropout.p > 0 and dropout.training
    if drops or not fusion.may_fuse(dropout, *linears):
        return False
    for linear in linears:
        if type(linear) is not kind or linear.bias is None:
            return False
    return True


def by_cpp(net: MLP | ResidualMLP, x: Tensor, context: Tensor | None) -> Tensor | None:
    """``net(x, context)`` by one C++ function; None where that does not apply."""
    layers = net.dense_layers() if x.is_cpu else None
    if layers is None:
        return None
    kinds, tensors = layers
    if net.context is not None:  # one product of both inputs
        if context is None or context.shape[:-1] != x.shape[:-1] or not fusion.may_fuse(net.context):
            return None
        x, tensors[0] = torch.cat((x, context), -1), torch.cat((tensors[0], net.context.weight), 1)
    return dense(x, kinds, tensors) if applies(x, tensors) else None


def check_at_least_one(**sizes: int) -> None:
    """ValueError with the name of a size that is below 1, or no whole number."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
        if not isinstance(size, int):
            raise ValueError(f"{name}={size} must be a whole number")


def context_layer(channels: int, context_shape) -> nn.Linear | None:
    """A linear map of the context vector to ``channels``, or None if there is no context."""
    if context_shape is None:
        return None
    if len(context_shape) != 1:
        raise ValueError(f"this network takes a context vector, not {list(context_shape)}")
    return nn.Linear(context_shape[0], channels, bias=False)
