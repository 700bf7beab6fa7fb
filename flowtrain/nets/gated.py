"""Gated convolutions and attention over the pixels of an image."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.attention import attend, check_heads
from flowtrain.nets.conv import add_context, channels_of, image_context
from flowtrain.nets.initial import random_normal, zero_init
from flowtrain.nets.mlp import check_at_least_one
from flowtrain.nets.norm import Dropout


class GatedAttentionConvNet(nn.Module):
    """Flow++'s conditioner (Ho et al. 2019, section 3.3, and its reference code): (B, C, H, W) -> (B, out, H, W).

    A 3×3 convolution, blocks of a gated convolution and attention over all pixels, a layer norm after each of the two,
    and a 3×3 convolution that starts at zero. The attention reads a learned row for each position, which all blocks
    share.

    Args:
        shape: (C, H, W).
        out: channels of the output.
        hidden: channels between.
        blocks: number of blocks.
        heads: of the attention.
        dropout: probability, before the gates.
        context_shape: (C,), (C, H, W) or None. A linear map of the context, of that at each pixel, is added after the
            first convolution.

    Raises:
        ValueError: ``shape`` is not an image's, a size below 1, or ``hidden`` no multiple of ``heads``.

    >>> GatedAttentionConvNet((3, 8, 8), out=4, hidden=16)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 96,
        blocks: int = 10,
        heads: int = 4,
        dropout: float = 0.0,
        context_shape=None,
    ):
        super().__init__()
        check_at_least_one(hidden=hidden, blocks=blocks, heads=heads)
        self.first = nn.Conv2d(channels_of(shape), hidden, 3, padding=1)
        self.context = image_context(hidden, context_shape, shape)
        self.position = nn.Parameter(random_normal(prod(shape[1:]), hidden, std=0.01))
        self.blocks = nn.ModuleList(_Block(hidden, heads, dropout) for _ in range(blocks))
        self.last = zero_init(nn.Conv2d(hidden, out, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, context=None):
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        h = add_context(h, self.context, context).permute(0, 2, 3, 1)
        for block in self.blocks:
            h = block(h, self.position)
        return self.last(h.permute(0, 3, 1, 2))


class _Block(nn.Module):
    """(B, H, W, hidden) -> the same shape."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        check_heads(hidden, heads)
        self.heads = heads
        self.conv, self.conv_gate = nn.Conv2d(2 * hidden, hidden, 3, padding=1), nn.Linear(2 * hidden, 2 * hidden)
        self.query_key_value, self.attention_gate = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, 2 * hidden)
        self.norm_conv, self.norm_attention = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.dropout = Dropout(dropout)

    def forward(self, h, position):
        inner = self.conv(both_signs(h).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        h = self.norm_conv(h + F.glu(self.conv_gate(self.dropout(both_signs(inner)))))
        tokens = h.flatten(1, 2)
        attention = attend(self.query_key_value(tokens + position), self.heads)
        tokens = tokens + F.glu(self.attention_gate(self.dropout(attention)))
        return self.norm_attention(tokens).unflatten(1, h.shape[1:3])


def both_signs(h: Tensor) -> Tensor:
    """ELU of h and of −h, side by side in the last axis."""
    return F.elu(torch.cat((h, -h), -1))
