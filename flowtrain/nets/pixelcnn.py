"""Causal convolutions over the pixels of an image, as a conditioner of autoregressive maps."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.initial import on_default_device, random_normal, small_init, zero_init
from flowtrain.nets.mlp import check_at_least_one, context_layer
from flowtrain.nets.norm import Dropout

ABOVE, LEFT = 3, 4  # rows above and pixels to the left that the first convolutions read
DOWN, ACROSS = 2, 3  # the axes of a batch of images along which a convolution is causal


class PixelCNN(nn.Module):
    """(B, D) -> (B, D, out), row i a function of the elements before i: of the pixels in rows, left to right, each with
    its channels in order (van den Oord et al. 2016a, 2016b).

    Two stacks of residual convolutions have no blind spot. What the first computes for a row depends on all of the rows
    above; it also works at halved resolutions, as a U-Net whose rows stay causal, so that a pixel sees far at little
    cost. The second computes a pixel from that and from the pixels to its left. A last layer adds the pixel's earlier
    channels. The output is zero at the start.

    Args:
        shape: (D,), with D = channels·height·width.
        out: parameters per element.
        image: (channels, height, width).
        bins: equal ones of [0, 1], of which the network reads the centres in place of the numbers, so that the noise of
            dequantization tells it nothing; None: it reads the numbers.
        hidden: channels of the convolutions.
        depth: residual blocks at each resolution on the way down, as many on the way up, and twice as many in the
            second stack.
        levels: resolutions.
        dropout: probability, inside each block.
        knots: if above 0, the parameters of an element are those of levels in order: besides its own weights each has
            those of knots in equal distances, between which they are interpolated. So levels close to each other learn
            together.
        context_shape: (C,), or None. A linear map of the context is added at every pixel.

    Raises:
        ValueError: a size below 1, ``knots`` of 1, or ``image`` is not one of D numbers.

    >>> PixelCNN((48,), out=2, image=(3, 4, 4), hidden=8)(torch.randn(5, 48)).shape
    torch.Size([5, 48, 2])
    """

    def __init__(
        self,
        shape,
        out: int,
        image,
        bins: int | None = None,
        hidden: int = 64,
        depth: int = 2,
        levels: int = 2,
        dropout: float = 0.0,
        knots: int = 0,
        context_shape=None,
    ):
        super().__init__()
        if len(image) != 3 or tuple(shape) != (prod(image),):
            raise ValueError(f"image={list(image)} must be (channels, height, width), of {list(shape)} numbers")
        check_at_least_one(hidden=hidden, depth=depth, levels=levels)
        if knots and knots < 2:
            raise ValueError(f"knots={knots} must be 0 or at least 2")
        self.image, self.bins = tuple(image), bins
        channels, height, width = self.image
        around = range(channels * (width - 1), channels * (width + 1) + 1)  # an element, in the row above
        self.offsets = sorted({*range(1, 2 * channels + 1), *around} - {0})
        self.above = nn.Conv2d(channels, hidden, (ABOVE, 2 * ABOVE + 1), padding=(0, ABOVE))
        self.left = nn.Conv2d(channels, hidden, (1, LEFT))
        self.position = nn.Parameter(random_normal(2 * hidden, height, width, std=0.05))
        self.context = context_layer(2 * hidden, context_shape)
        self.columns = _Rows(hidden, depth, levels, dropout)
        self.pixels = nn.ModuleList(_Block(hidden, (1, 3), ACROSS, dropout) for _ in range(2 * depth))
        self.norm = nn.LayerNorm(hidden)
        self.features = nn.Conv2d(hidden, channels * hidden, 1)
        self.near = nn.Conv2d(channels * len(self.offsets), channels * hidden, 1, groups=channels, bias=False)
        inputs = channels * (hidden + len(self.offsets))
        self.last = zero_init(nn.Conv2d(inputs, channels * out, 1, groups=channels))
        self.knots = zero_init(nn.Conv2d(inputs, channels * knots, 1, groups=channels)) if knots else None
        places = torch.linspace(0, knots - 1, out, device="cpu")[:, None] - torch.arange(knots, device="cpu")
        hats = (1 - places.abs()).clamp(min=0)  # (out, knots)
        self.register_buffer("hats", on_default_device(hats), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, context=None):
        channels, height, width = self.image
        x = self._spread(x)
        image = x.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        before_rows, before_pixels = self._constants(context)
        above = self.above(F.pad(image[:, :, :-1], (0, 0, ABOVE, 0)))
        h = self.left(F.pad(image[..., :-1], (LEFT, 0))) + self.columns(above + before_rows) + before_pixels
        for block in self.pixels:
            h = block(h)
        before = [F.pad(x, (offset, 0))[:, : x.shape[1]] for offset in self.offsets]
        near = torch.stack(before, 2).view(x.shape[0], height, width, self.near.in_channels).permute(0, 3, 1, 2)
        return self._rows(self._features(h), near)

    def _spread(self, x):
        """What is read of numbers in [0, 1], at about mean 0 and variance 1."""
        if self.bins:
            x = ((x * self.bins).floor().clamp(0, self.bins - 1) + 0.5) / self.bins
        return 4 * x - 2

    def _constants(self, context):
        """What enters each of the two stacks, whatever the pixels are."""
        constant = self.position if self.context is None else self.position + self.context(context)[..., None, None]
        return constant.chunk(2, -3)

    def _rows(self, features, near):
        """The rows of pixels, (B, pixels·channels, out), from their features (B, channels·hidden, height, width) and
        the elements near each, (B, channels·offsets, height, width)."""
        channels = self.image[0]
        h = F.silu(features + self.near(near))
        with torch.autocast(near.device.type, enabled=False):  # a rounded grey level would be another
            parts = [part.to(near.dtype).unflatten(1, (channels, -1)) for part in (h, near)]
            theta = self._last(torch.cat(parts, 2).flatten(1, 2))
        return theta.permute(0, 2, 3, 1).unflatten(3, (channels, -1)).flatten(1, 3)

    def _last(self, h):
        if self.knots is None:
            return self.last(h)
        channels, knots = self.image[0], self.hats.shape[1]
        weight = torch.matmul(self.hats, self.knots.weight.view(channels, knots, -1)).view_as(self.last.weight)
        bias = torch.matmul(self.knots.bias.view(channels, knots), self.hats.T).flatten()
        return F.conv2d(h, self.last.weight + weight, self.last.bias + bias, groups=channels)

    def init_cache(self, x: Tensor, context: Tensor | None = None) -> dict:
        """An empty cache for a pass over the elements of a batch like x (B, D)."""
        channels, _, width = self.image
        return {
            "constants": self._constants(context),
            "above": x.new_zeros(x.shape[0], channels, ABOVE, width),
            "row": [x.new_zeros(x.shape[0], channels, 1, 1)] * LEFT,
            "elements": [],
            "layers": {},
        }

    def step(self, x: Tensor, cache: dict) -> Tensor:
        """The next element's row, (B, 1, out), from the newest element, (B, 1), or none, (B, 0); extends ``cache``."""
        channels, elements = self.image[0], cache["elements"]
        if x.shape[1]:
            elements.append(self._spread(x))
        i = len(elements)
        pixel, channel = divmod(i, channels)
        if channel == 0:
            if i:
                cache["row"].append(torch.cat(elements[-channels:], 1)[..., None, None])
            row, column = divmod(pixel, self.image[2])
            cache["features"] = self._next_features(row, column, cache)
        zeros = torch.zeros_like(cache["row"][0][:, :1, 0, 0])
        near = torch.cat([elements[i - offset] if offset <= i else zeros for offset in self.offsets], 1)
        count = near.shape[1]
        near = F.pad(near, (channel * count, (channels - 1 - channel) * count))  # the others' rows are not wanted
        return self._rows(cache["features"], near[..., None, None])[:, channel : channel + 1]

    def _next_features(self, row, column, cache):
        """The features of the next pixel, (B, channels·hidden, 1, 1)."""
        before_rows, before_pixels = cache["constants"]
        if column == 0:
            if row:
                newest = torch.cat(cache["row"][LEFT:], 3)
                cache["above"] = torch.cat((cache["above"][:, :, 1:], newest), 2)
                cache["row"] = [torch.zeros_like(cache["row"][0])] * LEFT
            above = self.above(cache["above"]) + before_rows[..., row : row + 1, :]
            cache["rows"] = self.columns(above, cache["layers"], row)
            for block in self.pixels:
                cache["layers"].pop(block, None)
        here = (..., slice(row, row + 1), slice(column, column + 1))
        h = self.left(torch.cat(cache["row"][-LEFT:], 3)) + cache["rows"][..., column : column + 1]
        h = h + before_pixels[here]
        for block in self.pixels:
            h = block(h, cache["layers"])
        return self._features(h)

    def _features(self, h):
        """What the last layers read of the second stack, (B, channels·hidden, height, width)."""
        return self.features(self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class _Rows(nn.Module):
    """A U-Net of whole rows, in which a row depends on itself and on those above it."""

    def __init__(self, hidden, depth, levels, dropout):
        super().__init__()
        self.down = nn.ModuleList(_Block(hidden, (2, 3), DOWN, dropout) for _ in range(depth))
        self.coarser = _Rows(hidden, depth, levels - 1, dropout) if levels > 1 else None
        if self.coarser is not None:
            self.halve = nn.Conv2d(hidden, hidden, (2, 4), 2)
            self.enlarge = small_init(nn.ConvTranspose2d(hidden, hidden, 2, 2))
            self.up = nn.ModuleList(_Block(hidden, (2, 3), DOWN, dropout) for _ in range(depth))

    def forward(self, h: Tensor, cache: dict | None = None, row: int = 0) -> Tensor:
        """All rows, or with a ``cache`` the one of index ``row``."""
        for block in self.down:
            h = block(h, cache)
        if self.coarser is None:
            return h
        h = h + self._from_coarser(h, cache, row)
        for block in self.up:
            h = block(h, cache)
        return h

    def _from_coarser(self, h, cache, row):
        """Rows 2j and 2j + 1 of this resolution get coarser row j, which depends on rows up to 2j."""
        height, width = h.shape[2:]
        padded = _with_before(F.pad(h, (1, 1 + width % 2)), DOWN, 1, cache, self)
        if cache is None:
            return self.enlarge(self.coarser(self.halve(padded)))[:, :, :height, :width]
        if row % 2 == 0:
            cache[self.enlarge] = self.enlarge(self.coarser(self.halve(padded), cache, row // 2))[..., :width]
        return cache[self.enlarge][:, :, row % 2 : row % 2 + 1]


class _Block(nn.Module):
    """A residual block whose convolution reads no later rows (``axis`` DOWN), or no later pixels (ACROSS)."""

    def __init__(self, hidden, kernel, axis, dropout):
        super().__init__()
        self.axis, self.before = axis, kernel[axis - 2] - 1
        self.conv = nn.Conv2d(hidden, hidden, kernel, padding=(0, kernel[1] // 2 if axis == DOWN else 0))
        self.dropout = Dropout(dropout)
        self.mix = small_init(nn.Conv2d(hidden, hidden, 1))

    def forward(self, h: Tensor, cache: dict | None = None) -> Tensor:
        padded = _with_before(F.silu(h), self.axis, self.before, cache, self)
        return h + self.mix(self.dropout(F.silu(self.conv(padded))))


def _with_before(h: Tensor, axis: int, count: int, cache: dict | None, key: nn.Module) -> Tensor:
    """h and the ``count`` rows or columns before it, which a cache keeps under ``key``; zeros where there are none."""
    if cache is None or key not in cache:
        whole = F.pad(h, (0, 0, count, 0) if axis == DOWN else (count, 0))
    else:
        whole = torch.cat((cache[key], h), axis)
    if cache is not None:
        cache[key] = whole.narrow(axis, whole.shape[axis] - count, count)
    return whole
