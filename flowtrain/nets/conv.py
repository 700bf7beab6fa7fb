"""Convolutional networks that keep the size of an image."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from flowtrain.nets.initial import random_normal, small_init, zero_init
from flowtrain.nets.mlp import check_at_least_one, context_layer
from flowtrain.nets.norm import ActNorm, BatchNorm, Dropout
from flowtrain.runtime import fusion


class ZeroConv(nn.Module):
    """A 3×3 convolution, zero at the start, times exp(3·log_scale) for each output channel (Kingma & Dhariwal 2018,
    reference code): (B, C, H, W) -> (B, out, H, W).

    The factor 3 lets the scale learn faster than the weights. A linear map of the context, if there is one, zero at the
    start too, is added before the factor.

    Raises:
        ValueError: ``shape`` is not an image's, or the context is neither a vector nor an image of the same sides.

    >>> ZeroConv((3, 8, 8), out=4)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(self, shape, out: int, context_shape=None):
        super().__init__()
        self.conv = zero_init(nn.Conv2d(channels_of(shape), out, 3, padding=1))
        context_map = image_context(out, context_shape, shape)
        self.context = None if context_map is None else zero_init(context_map)
        self.log_scale = nn.Parameter(torch.zeros(out, 1, 1))

    def forward(self, x, context=None):
        h = add_context(self.conv(x), self.context, context)
        return h * (3 * self.log_scale).exp()


class ConvNet(nn.Module):
    """Glow's conditioner: a 3×3, a 1×1 and a :class:`ZeroConv` 3×3 convolution, with rectifiers between (Kingma &
    Dhariwal 2018, section 4): (B, C, H, W) -> (B, out, H, W).

    Args:
        shape: (C, H, W).
        out: channels of the output.
        hidden: channels between.
        norm: factory of the normalization after each of the first two convolutions, in place of their biases; or None.
        dropout: probability, after each rectifier.
        context_shape: (C,), (C, H, W) or None. A linear map of the context, of that at each pixel, is added after the
            first convolution.

    Raises:
        ValueError: ``shape`` is not an image's, or ``hidden`` below 1.

    >>> ConvNet((3, 8, 8), out=4, hidden=16)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 512,
        norm: Callable[[int], nn.Module] | None = ActNorm,
        dropout: float = 0.0,
        context_shape=None,
    ):
        super().__init__()
        check_at_least_one(hidden=hidden)
        self.first = nn.Conv2d(channels_of(shape), hidden, 3, padding=1, bias=norm is None)
        self.norm_first = norm(hidden) if norm else nn.Identity()
        self.context = image_context(hidden, context_shape, shape)
        self.second = nn.Conv2d(hidden, hidden, 1, bias=norm is None)
        self.norm_second = norm(hidden) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.last = ZeroConv((hidden, *shape[1:]), out)
        if norm:
            for conv in (self.first, self.second):
                conv.weight = nn.Parameter(random_normal(*conv.weight.shape, std=0.05))
        self.to(memory_format=torch.channels_last)  # on a CPU several times faster, and what tensor cores want

    def convolutions(self) -> list[tuple[Any, Any, Any, float]] | None:
        """The convolutions, with rectifiers and dropout between them, for a gradient written by hand; None if the
        network is more than that. Of each: weight, bias, and a tensor and a factor, the exponential of whose product
        multiplies the output channels."""
        pairs = (self.first, self.norm_first), (self.second, self.norm_second)
        if self.context is not None or not all(type(norm) in (ActNorm, nn.Identity) for _, norm in pairs):
            return None
        if not fusion.may_fuse(self, *chain(*pairs), self.dropout, self.last, self.last.conv):
            return None
        hidden = [
            (conv.weight, conv.bias, None, 1.0)
            if isinstance(norm, nn.Identity)
            else (conv.weight, norm.bias, norm.log_scale, 1.0)
            for conv, norm in pairs
        ]
        return [*hidden, (self.last.conv.weight, self.last.conv.bias, self.last.log_scale, 3.0)]

    def forward(self, x, context=None):
        h = conv_and_norm(self.first, self.norm_first, x.contiguous(memory_format=torch.channels_last))
        h = add_context(h, self.context, context)
        h = conv_and_norm(self.second, self.norm_second, F.relu_(self.dropout(h)))
        return self.last(F.relu_(self.dropout(h)))


class _Conv(nn.Conv2d):
    """A convolution that pickle accepts with weight normalization, for which torch makes it a class of its own."""

    def __reduce_ex__(self, protocol):
        size = self.in_channels, self.out_channels, self.kernel_size
        state = {name: value for name, value in vars(self).items() if not name.endswith("hooks")}  # which a copy has
        return normalized_conv, size, state, None, None, _set_attributes


def _set_attributes(module: nn.Module, attributes: dict) -> None:
    vars(module).update(attributes)


def normalized_conv(*size, **options) -> Any:
    """A convolution with weight normalization (Salimans & Kingma 2016)."""
    convolution = _Conv(*size, **options)
    register_parametrization(convolution, "weight", _WeightNorm(), unsafe=True)  # it makes two weights of one
    return convolution


class _WeightNorm(nn.Module):
    """A weight of its length and its direction, for each output channel. torch's own imports the compiler for a weight
    on the meta device."""

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        return torch._weight_norm(direction, length, 0)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        length = weight.new_empty(len(weight), 1, 1, 1) if weight.is_meta else torch.norm_except_dim(weight, 2, 0)
        return length, weight


class ResidualConvNet(nn.Module):
    """Real NVP's conditioner (Dinh et al. 2017, sections 3.7 and 4.1, and its reference code): (B, C, H, W) ->
    (B, out, H, W).

    x and −x, normalized, go through a 3×3 convolution and pre-activated residual blocks of two 3×3 convolutions. The
    last layer reads the sum of all blocks' outputs, each through a 1×1 convolution. All convolutions have weight
    normalization. The last one starts at zero, which the paper's does not.

    Args:
        shape: (C, H, W).
        out: channels of the output.
        hidden: channels at a width of ``full_side``, doubled each time the width halves.
        full_side: a width in pixels; by default W.
        blocks: number of residual blocks.
        norm: factory of the normalization before each rectifier; or None.
        dropout: probability, inside each block.
        context_shape: (C,), (C, H, W) or None. A linear map of the context, of that at each pixel, is added after the
            first convolution.

    Raises:
        ValueError: ``shape`` is not an image's, or a size is below 1.

    >>> ResidualConvNet((3, 8, 8), out=4, hidden=16, blocks=2)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 64,
        full_side: int | None = None,
        blocks: int = 8,
        norm: Callable[[int], nn.Module] | None = BatchNorm,
        dropout: float = 0.0,
        context_shape=None,
    ):
        super().__init__()
        check_at_least_one(hidden=hidden, blocks=blocks)
        norm = norm or nn.Identity
        channels = channels_of(shape)
        hidden = hidden * (full_side or shape[-1]) // shape[-1]
        self.norm_in = norm(channels)
        self.first = normalized_conv(2 * channels, hidden, 3, padding=1)
        self.context = image_context(hidden, context_shape, shape)
        self.skip_first = normalized_conv(hidden, hidden, 1)
        self.blocks = nn.ModuleList(_Residual(hidden, norm, dropout) for _ in range(blocks))
        self.skips = nn.ModuleList(normalized_conv(hidden, hidden, 1) for _ in range(blocks))
        self.norm_out = norm(hidden)
        self.last = normalized_conv(hidden, out, 1)
        self.to(memory_format=torch.channels_last)
        for conv in (self.skip_first, *self.skips, self.last):  # 1×1: as the gradient of a weight norm is laid out
            direction = conv.parametrizations.weight.original1
            direction.data = direction.data.clone(memory_format=torch.contiguous_format)
        with torch.no_grad():  # the magnitude alone, so that the direction of the weights stays defined
            self.last.parametrizations.weight.original0.zero_()
            self.last.bias.zero_()

    def forward(self, x, context=None):
        x = self.norm_in(x.contiguous(memory_format=torch.channels_last))
        h = self.first(F.relu(torch.cat((x, -x), 1)))
        h = add_context(h, self.context, context)
        total = self.skip_first(h)
        for block, skip in zip(self.blocks, self.skips):
            h = block(h)
            total = total + skip(h)
        return self.last(F.relu(self.norm_out(total)))


class _Residual(nn.Module):
    def __init__(self, hidden, norm, dropout):
        super().__init__()
        self.norm_first, self.norm_second = norm(hidden), norm(hidden)
        self.first = normalized_conv(hidden, hidden, 3, padding=1, bias=False)
        self.second = normalized_conv(hidden, hidden, 3, padding=1)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        h = self.first(F.relu(self.norm_first(x)))
        return x + self.second(F.relu(self.dropout(self.norm_second(h))))


class PreactivatedConvNet(nn.Module):
    """Neural spline flows' conditioner for images (Durkan et al. 2019, reference code): (B, C, H, W) -> (B, out, H, W).

    A 1×1 convolution, pre-activated residual blocks of two 3×3 convolutions, and a 1×1 convolution that starts at zero,
    which theirs does not.

    Args:
        shape: (C, H, W).
        out: channels of the output.
        hidden: channels between.
        blocks: number of residual blocks.
        norm: factory of the normalization before each rectifier; or None.
        dropout: probability, inside each block.
        context_shape: (C,), (C, H, W) or None. A linear map of the context, of that at each pixel, is added after the
            first convolution.

    Raises:
        ValueError: ``shape`` is not an image's, or a size is below 1.

    >>> PreactivatedConvNet((3, 8, 8), out=4, hidden=16)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 96,
        blocks: int = 3,
        norm: Callable[[int], nn.Module] | None = BatchNorm,
        dropout: float = 0.0,
        context_shape=None,
    ):
        super().__init__()
        check_at_least_one(hidden=hidden, blocks=blocks)
        self.first = nn.Conv2d(channels_of(shape), hidden, 1)
        self.context = image_context(hidden, context_shape, shape)
        self.blocks = nn.ModuleList(_Preactivated(hidden, norm or nn.Identity, dropout) for _ in range(blocks))
        self.last = zero_init(nn.Conv2d(hidden, out, 1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, context=None):
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        h = add_context(h, self.context, context)
        for block in self.blocks:
            h = block(h)
        return self.last(h)


class _Preactivated(nn.Module):
    def __init__(self, hidden, norm, dropout):
        super().__init__()
        self.norm_first, self.norm_second = norm(hidden), norm(hidden)
        self.first = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.second = small_init(nn.Conv2d(hidden, hidden, 3, padding=1))
        self.dropout = Dropout(dropout)

    def forward(self, x):
        h = self.first(F.relu(self.norm_first(x)))
        return x + self.second(F.relu(self.dropout(self.norm_second(h))))


def conv_and_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, with an actnorm folded into the convolution's few weights: one pass over its many outputs."""
    if not isinstance(norm, ActNorm) or not fusion.may_fuse(conv, norm):
        return norm(conv(x))
    scale, bias = norm.log_scale.exp(), norm.bias if conv.bias is None else norm.bias + conv.bias
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), bias * scale)


def image_context(channels: int, context_shape, shape) -> nn.Module | None:
    """A linear map of a context vector, or of each pixel of a context image, to ``channels``; None without a context.

    Raises:
        ValueError: a context of another shape: an image needs the sides of ``shape``.
    """
    if context_shape is None or len(context_shape) == 1:
        return context_layer(channels, context_shape)
    if len(context_shape) != 3 or tuple(context_shape[1:]) != tuple(shape[1:]):
        sides = "×".join(map(str, shape[1:]))
        raise ValueError(
            f"this network takes a context vector, or a context image of {sides} pixels, not {list(context_shape)}"
        )
    return nn.Conv2d(context_shape[0], channels, 1, bias=False)


def add_context(h: Tensor, layer: nn.Module | None, context: Tensor | None) -> Tensor:
    """h (B, C, H, W) plus what ``layer``, an :func:`image_context`, makes of the context."""
    if layer is None:
        return h
    added = layer(context)
    return h + (added if added.dim() == h.dim() else added[:, :, None, None])


def channels_of(shape) -> int:
    """C of (C, H, W). ValueError for another shape."""
    if len(shape) != 3:
        raise ValueError(f"a convolutional network takes images (channels, height, width), not {list(shape)}")
    return shape[0]
