"""Fully connected networks."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from flowtrain.nets.norm import Dropout


class MLP(nn.Module):
    """(B, n) -> (B, out): ``depth`` hidden layers of ``hidden`` rectified units, the last layer zero at the start.

    A context vector is added, linearly, to the first hidden layer.
    """

    def __init__(self, shape, out: int, hidden: int = 256, depth: int = 2, dropout: float = 0.0, context_shape=None):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"an MLP takes vectors, not {list(shape)}; flatten first")
        at_least_one(hidden=hidden, depth=depth)
        self.first = nn.Linear(shape[0], hidden)
        self.context = context_to(hidden, context_shape)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.dropout = Dropout(dropout)
        self.last = zeroed(nn.Linear(hidden, out))

    def forward(self, x, context=None):
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(context)
        for layer in self.hidden:
            h = layer(self.dropout(F.relu(h)))
        return self.last(self.dropout(F.relu(h)))


class ResidualMLP(nn.Module):
    """(B, n) -> (B, out): ``blocks`` pre-activated residual blocks of two layers of ``hidden`` rectified units, the
    last layer zero at the start (Durkan et al. 2019, appendix B.1).

    A context vector is added, linearly, to the first hidden layer.
    """

    def __init__(self, shape, out: int, hidden: int = 64, blocks: int = 2, dropout: float = 0.0, context_shape=None):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"a ResidualMLP takes vectors, not {list(shape)}; flatten first")
        at_least_one(hidden=hidden, blocks=blocks)
        self.first = nn.Linear(shape[0], hidden)
        self.context = context_to(hidden, context_shape)
        self.ones = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.others = nn.ModuleList(nearly_zero(nn.Linear(hidden, hidden)) for _ in range(blocks))
        self.dropout = Dropout(dropout)
        self.last = zeroed(nn.Linear(hidden, out))

    def forward(self, x, context=None):
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(context)
        for one, other in zip(self.ones, self.others):
            h = h + other(self.dropout(F.relu(one(F.relu(h)))))
        return self.last(h)


def at_least_one(**sizes: int) -> None:
    """Refuse a size below 1 by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def context_to(channels: int, context_shape) -> nn.Linear | None:
    """The layer through which a context vector enters a network, or None where there is no context."""
    if context_shape is None:
        return None
    if len(context_shape) != 1:
        raise ValueError(f"this network takes a context vector, not {list(context_shape)}")
    return nn.Linear(context_shape[0], channels, bias=False)


def zeroed(layer: nn.Module) -> nn.Module:
    """``layer`` with its parameters at zero, so that a new flow starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def nearly_zero(layer: nn.Module) -> nn.Module:
    """``layer`` with small parameters, for the second layer of a residual block: the block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1e-3, 1e-3)
    return layer
