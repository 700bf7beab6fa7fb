"""The dynamics of continuous-time flows: networks f(t, x) with the shape of x.

They are smooth, which an adaptive solver needs, and their last layer is zero at the start, so that a new flow is the
identity. The time is one number, or one for each row: (B, 1, …) with as many axes as x.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from flowtrain.nets.conv import channels_of
from flowtrain.nets.initial import zero_init
from flowtrain.nets.mlp import check_at_least_one, context_layer


class Concat(nn.Module):
    """W·[t, x] + b: a linear layer with the time as another input."""

    def __init__(self, n: int, out: int):
        super().__init__()
        self.linear = nn.Linear(n + 1, out)

    def forward(self, t, x):
        return self.linear(with_time(t, x))


class ConcatConv(nn.Module):
    """A 3×3 convolution with the time as another channel."""

    def __init__(self, n: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(n + 1, out, 3, padding=1)

    def forward(self, t, x):
        return self.conv(with_time(t, x))


class Squash(nn.Module):
    """h ↦ h·σ(g·t + c) + d·t for each channel: how time enters a layer in FFJORD's tables (its reference code)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate, self.gate_bias, self.shift = (nn.Parameter(torch.empty(channels)) for _ in range(3))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1, 1)  # as in a linear layer with one input

    def forward(self, t, h):
        gate, bias, shift = (one.view(-1, *[1] * (h.dim() - 2)) for one in (self.gate, self.gate_bias, self.shift))
        return torch.addcmul(shift * t, h, torch.sigmoid(torch.addcmul(bias, gate, t)))


class ConcatSquash(nn.Module):
    """(W·x + b)·σ(g·t + c) + d·t: a linear layer and :class:`Squash`."""

    def __init__(self, n: int, out: int):
        super().__init__()
        self.linear, self.squash = nn.Linear(n, out), Squash(out)

    def forward(self, t, x):
        return self.squash(t, self.linear(x))


class ConcatSquashConv(nn.Module):
    """A 3×3 convolution and :class:`Squash`."""

    def __init__(self, n: int, out: int):
        super().__init__()
        self.conv, self.squash = nn.Conv2d(n, out, 3, padding=1), Squash(out)

    def forward(self, t, x):
        return self.squash(t, self.conv(x))


class Dynamics(nn.Module):
    """``depth`` hidden layers of ``hidden`` channels, between layers with the time as an input.

    A linear map of the context vector, if there is one, is added to the first hidden layer.
    """

    layers_by_name: dict[str, Callable[[int, int], nn.Module]]

    def __init__(self, channels: int, hidden: int, depth: int, layer: str, activation: str, context_shape):
        super().__init__()
        check_at_least_one(hidden=hidden, depth=depth)
        kind = choose("layer", layer, self.layers_by_name)
        self.activation = choose("activation", activation, {"tanh": torch.tanh, "softplus": F.softplus})
        widths = [channels, *[hidden] * depth, channels]
        self.layers = nn.ModuleList(kind(n, out) for n, out in pairwise(widths))
        self.context = context_layer(hidden, context_shape)
        zero_init(self.layers[-1])

    def forward(self, t, x, context=None):
        """dx/dt at time ``t``, a scalar or (B, 1, …): (B, *shape)."""
        first, *others = self.layers
        h = first(t, x)
        if self.context is not None:
            h = h + self.context(context).view(*h.shape[:2], *[1] * (h.dim() - 2))
        for layer in others:
            h = layer(t, self.activation(h))
        return h


class ODENet(Dynamics):
    """Fully connected dynamics of vectors: f(t, x) of x (B, D) is (B, D) (Grathwohl et al. 2019, reference code).

    Args:
        shape: (D,).
        hidden: units of each hidden layer.
        depth: number of hidden layers.
        layer: "concatsquash", as in FFJORD's experiments on tables, or "concat".
        activation: "tanh" or "softplus".
        context_shape: (C,), or None. A linear map of the context is added to the first hidden layer.

    Raises:
        ValueError: ``shape`` is not a vector's, a size below 1, or an unknown name.

    >>> ODENet((2,))(torch.tensor(0.5), torch.randn(5, 2)).shape
    torch.Size([5, 2])
    """

    layers_by_name = {"concat": Concat, "concatsquash": ConcatSquash}

    def __init__(
        self,
        shape,
        hidden: int = 64,
        depth: int = 3,
        layer: str = "concatsquash",
        activation: str = "tanh",
        context_shape=None,
    ):
        if len(shape) != 1:
            raise ValueError(f"an ODENet takes vectors, not {list(shape)}; flatten first")
        super().__init__(shape[0], hidden, depth, layer, activation, context_shape)


class ConvODENet(Dynamics):
    """Convolutional dynamics of images: f(t, x) of x (B, C, H, W) is (B, C, H, W) (Grathwohl et al. 2019, reference
    code).

    Args:
        shape: (C, H, W).
        hidden: channels of each hidden layer.
        depth: number of hidden layers.
        layer: "concat", as in FFJORD's experiments on images, or "concatsquash"; each with a 3×3 convolution.
        activation: "softplus" or "tanh".
        context_shape: (C,), or None. A linear map of the context is added to the first hidden layer.

    Raises:
        ValueError: ``shape`` is not an image's, a size below 1, or an unknown name.

    >>> ConvODENet((3, 8, 8))(torch.tensor(0.5), torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """

    layers_by_name = {"concat": ConcatConv, "concatsquash": ConcatSquashConv}

    def __init__(
        self,
        shape,
        hidden: int = 64,
        depth: int = 3,
        layer: str = "concat",
        activation: str = "softplus",
        context_shape=None,
    ):
        super().__init__(channels_of(shape), hidden, depth, layer, activation, context_shape)


def with_time(t, x):
    """(B, C, …) -> (B, 1 + C, …): the time as the first channel."""
    return torch.cat((t.to(x.dtype).expand_as(x[:, :1]), x), 1)


def choose(argument: str, name: str, options: dict):
    """``options[name]``. ValueError with the name of the argument if there is none."""
    if name not in options:
        raise ValueError(f"{argument}='{name}' must be {' or '.join(options)}")
    return options[name]
