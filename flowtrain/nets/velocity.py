"""Residual networks for the velocity of a flow from data (time 0) to noise (time 1), made for flow matching.

On the straight path x_t = (1 − t)·x + t·ε from data of mean 0 and variance 1 to noise, the best linear estimate of the
velocity ε − x is (2t − 1)·x_t/s², with s² = (1 − t)² + t², and what it leaves has the scale 1/s. So a network F returns
(2t − 1)·x_t/s² + F/s, as the denoisers of Karras et al. 2022 (section 5) do. F is zero at the start, and the linear
part alone takes every x back to itself at time 1: a new flow is the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.conv import channels_of
from flowtrain.nets.initial import on_default_device, random_normal, small_init, zero_init
from flowtrain.nets.mlp import check_at_least_one, context_layer
from flowtrain.nets.norm import Dropout

WAVES, FEATURES = 8, 64  # sines and cosines of the logarithm of the time; features of it
FLOOR = 1e-3  # added to the time in its logarithm: below it there is nothing to tell apart


class TimeEmbedding(nn.Module):
    """Features of the time and of a context vector, (B, features) or (1, features).

    The time enters by its logarithm: what is left of data of many scales, such as a flat patch of a photograph and its
    grain, changes with the order of magnitude of the noise.

    >>> TimeEmbedding(8, (3,))(torch.zeros(5, 1), torch.zeros(5, 3)).shape
    torch.Size([5, 8])
    """

    frequencies: Tensor

    def __init__(self, features: int, context_shape=None):
        super().__init__()
        frequencies = torch.linspace(0.25, 2, WAVES, device="cpu")
        self.register_buffer("frequencies", on_default_device(frequencies), persistent=False)
        self.first = nn.Linear(2 * WAVES + 1, features)
        self.context = context_layer(features, context_shape)
        self.second = nn.Linear(features, features)

    def forward(self, t, context=None):
        log_t = (t.reshape(-1, 1) + FLOOR).log()
        angle = log_t * self.frequencies
        h = self.first(torch.cat((log_t, angle.sin(), angle.cos()), 1))
        if self.context is not None:
            h = h + self.context(context)
        return F.silu(self.second(F.silu(h)))


class VelocityMLP(nn.Module):
    """The velocity of vectors: residual blocks of two layers, whose input the time scales and shifts (Perez et al.
    2018).

    Args:
        shape: (D,).
        hidden: units of each hidden layer.
        depth: number of residual blocks.
        dropout: probability, inside each block.
        context_shape: (C,), or None.

    Raises:
        ValueError: ``shape`` is not a vector's, a size below 1, or ``dropout`` outside [0, 1).

    >>> VelocityMLP((2,), hidden=16)(torch.rand(5, 1), torch.randn(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, shape, hidden: int = 128, depth: int = 3, dropout: float = 0.0, context_shape=None):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"a VelocityMLP takes vectors, not {list(shape)}; flatten first")
        check_at_least_one(hidden=hidden, depth=depth)
        self.time = TimeEmbedding(FEATURES, context_shape)
        self.first = nn.Linear(shape[0], hidden)
        self.blocks = nn.ModuleList(_Block(hidden, dropout) for _ in range(depth))
        self.last = zero_init(nn.Linear(hidden, shape[0]))

    def forward(self, t, x, context=None):
        """dx/dt at time ``t``, a scalar or (B, 1): (B, D)."""
        time = self.time(t, context)
        h = self.first(x / path_scale(t))
        for block in self.blocks:
            h = block(h, time)
        return with_linear_part(self.last(F.silu(h)), t, x)


class _Block(nn.Module):
    """h + W₂·silu(W₁·silu(a·h + b)), with a and b of the time."""

    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.modulate = zero_init(nn.Linear(FEATURES, 2 * hidden))
        self.one = nn.Linear(hidden, hidden)
        self.dropout = Dropout(dropout)
        self.other = small_init(nn.Linear(hidden, hidden))

    def forward(self, h, time):
        scale, shift = self.modulate(time).chunk(2, 1)
        return h + self.other(self.dropout(F.silu(self.one(F.silu(torch.addcmul(h + shift, h, scale))))))


class VelocityGains(nn.Module):
    """The velocity of vectors by linear filters y = W·x + b, to each of which a network gives a gain: F = V·(g ⊙ y).
    The gains g depend on the time and on the energies log(y² + c) of all filters.

    So the scale of one filter can depend on the others. In photographs filters are large and small together (Schwartz
    and Simoncelli 2001). With enough filters, a mixture of normal distributions of mean 0 has a velocity of this form.

    Args:
        shape: (D,).
        filters: how many.
        hidden: units of each hidden layer of the gains.
        depth: number of residual blocks of the gains, of one layer.
        dropout: probability, inside each block.
        context_shape: (C,), or None.

    Raises:
        ValueError: ``shape`` is not a vector's, a size below 1, or ``dropout`` outside [0, 1).

    >>> VelocityGains((2,), filters=16, hidden=16)(torch.rand(5, 1), torch.randn(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, shape, filters: int = 128, hidden: int = 128, depth: int = 1, dropout: float = 0.0, context_shape=None
    ):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"VelocityGains takes vectors, not {list(shape)}; flatten first")
        check_at_least_one(filters=filters, hidden=hidden, depth=depth)
        self.time = TimeEmbedding(FEATURES, context_shape)
        self.filters = nn.Linear(shape[0], filters)
        self.floor = nn.Linear(FEATURES, filters)
        self.first = nn.Linear(filters, hidden)
        self.blocks = nn.ModuleList(_GainBlock(hidden, dropout) for _ in range(depth))
        self.gains = zero_init(nn.Linear(hidden, filters))
        self.last = nn.Linear(filters, shape[0], bias=False)
        start = random_normal(filters, shape[0], std=shape[0] ** -0.5)
        self.filters.weight = nn.Parameter(start)
        self.last.weight = nn.Parameter(start.T.clone(memory_format=torch.contiguous_format))

    def forward(self, t, x, context=None):
        """dx/dt at time ``t``, a scalar or (B, 1): (B, D)."""
        time = self.time(t, context)
        y = self.filters(x / path_scale(t))
        h = self.first((y * y + F.softplus(self.floor(time))).log())
        for block in self.blocks:
            h = block(h, time)
        return with_linear_part(self.last(self.gains(F.silu(h)) * y), t, x)


class _GainBlock(nn.Module):
    """h + W·silu(a·h + b), with a and b of the time."""

    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.modulate = zero_init(nn.Linear(FEATURES, 2 * hidden))
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, h, time):
        scale, shift = self.modulate(time).chunk(2, 1)
        return h + self.linear(self.dropout(F.silu(torch.addcmul(h + shift, h, scale))))


def path_scale(t: Tensor) -> Tensor:
    """√((1 − t)² + t²): the deviation of a mix of standardized data and noise."""
    return torch.hypot(1 - t, t)


def with_linear_part(rest: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """(2t − 1)·x/s² + rest/s, s = :func:`path_scale`."""
    scale = path_scale(t)
    return ((2 * t - 1) / scale * x + rest) / scale


class VelocityConvNet(nn.Module):
    """The velocity of images: a small U-Net (Ronneberger et al. 2015) of residual blocks of two 3×3 convolutions, which
    the time scales and shifts.

    Args:
        shape: (C, H, W).
        hidden: channels at full size; twice as many at each smaller one.
        depth: residual blocks at each size, on the way down and on the way up.
        levels: how often the sides are halved; None: at most twice, to whole numbers of at least 4 pixels.
        dropout: probability, inside each block.
        context_shape: (C,), or None.

    Raises:
        ValueError: ``shape`` is not an image's, a size below 1, sides that cannot be halved so often, or ``dropout``
            outside [0, 1).

    >>> VelocityConvNet((1, 8, 8), hidden=8)(torch.rand(5, 1, 1, 1), torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        shape,
        hidden: int = 32,
        depth: int = 1,
        levels: int | None = None,
        dropout: float = 0.0,
        context_shape=None,
    ):
        super().__init__()
        check_at_least_one(hidden=hidden, depth=depth)
        channels = channels_of(shape)
        halvings = count_halvings(shape[1:])
        if levels is None:
            levels = min(2, halvings)
        elif not 0 <= levels <= halvings:
            raise ValueError(f"levels={levels} must be from 0 to {halvings} for sides of {shape[1]}×{shape[2]}")
        widths = [hidden * 2**i for i in range(levels + 1)]
        self.time = TimeEmbedding(FEATURES, context_shape)
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.smaller, self.larger = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(nn.ModuleList(_ConvBlock(width, dropout) for _ in range(depth)))
            if i < levels:
                self.smaller.append(nn.Conv2d(4 * width, widths[i + 1], 1))
                self.larger.append(nn.Conv2d(widths[i + 1], 4 * width, 1))
                self.up.append(nn.ModuleList(_ConvBlock(width, dropout) for _ in range(depth)))
        self.last = zero_init(nn.Conv2d(hidden, channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, t, x, context=None):
        """dx/dt at time ``t``, a scalar or (B, 1, 1, 1): (B, C, H, W)."""
        time = self.time(t, context)
        h, kept = self.first((x / path_scale(t)).contiguous(memory_format=torch.channels_last)), []
        for i, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, time)
            if i < len(self.smaller):
                kept.append(h)
                h = self.smaller[i](F.pixel_unshuffle(h, 2))
        for i in reversed(range(len(self.larger))):
            h = kept[i] + F.pixel_shuffle(self.larger[i](h), 2)
            for block in self.up[i]:
                h = block(h, time)
        return with_linear_part(self.last(F.silu(h)), t, x)


class _ConvBlock(nn.Module):
    """h + W₂ * silu(W₁ * silu(a·norm(h) + b)), with a and b of the time for each channel."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(channels, max(1, channels // 4)), channels)
        self.modulate = zero_init(nn.Linear(FEATURES, 2 * channels))
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = Dropout(dropout)
        self.other = small_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h, time):
        scale, shift = self.modulate(time)[:, :, None, None].chunk(2, 1)
        middle = self.one(F.silu(self.norm(h) * (1 + scale) + shift))
        return h + self.other(self.dropout(F.silu(middle)))


def count_halvings(sides) -> int:
    """How often both sides can be halved to whole numbers of at least 4 pixels."""
    height, width = sides
    return 0 if height % 2 or width % 2 or min(sides) < 8 else 1 + count_halvings((height // 2, width // 2))
