"""A transformer over the pixels of an image."""

from __future__ import annotations

from math import prod

from torch import nn

from flowtrain.nets.attention import TransformerBlock
from flowtrain.nets.conv import channels_of
from flowtrain.nets.initial import random_normal, zero_init
from flowtrain.nets.mlp import check_at_least_one, context_layer


class VisionTransformer(nn.Module):
    """Jet's conditioner (Kolesnikov et al. 2024, section 3; Dosovitskiy et al. 2021): (B, C, H, W) -> (B, out, H, W).

    Pre-normalized blocks of attention over all pixels. Each pixel is a token, or each patch of an image that was
    squeezed. A learned row is added at each position. The last layer starts at zero.

    Args:
        shape: (C, H, W).
        out: channels of the output.
        hidden: channels of a token.
        depth: number of blocks.
        heads: of the attention.
        expand: width of the feed-forward layers, in multiples of ``hidden``.
        dropout: probability.
        context_shape: (C,), or None. A linear map of the context is added at every position.

    Raises:
        ValueError: ``shape`` is not an image's, a size below 1, or ``hidden`` no multiple of ``heads``.

    >>> import torch
    >>> VisionTransformer((3, 8, 8), out=4)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 64,
        depth: int = 2,
        heads: int = 4,
        expand: int = 4,
        dropout: float = 0.0,
        context_shape=None,
    ):
        super().__init__()
        check_at_least_one(hidden=hidden, depth=depth, heads=heads, expand=expand)
        self.embed = nn.Linear(channels_of(shape), hidden)
        self.position = nn.Parameter(random_normal(prod(shape[1:]), hidden, std=0.02))
        self.context = context_layer(hidden, context_shape)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden, heads, expand, dropout, causal=False) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden)
        self.last = zero_init(nn.Linear(hidden, out))

    def forward(self, x, context=None):
        h = self.embed(x.flatten(2).transpose(1, 2)) + self.position
        if self.context is not None:
            h = h + self.context(context)[:, None]
        for block in self.blocks:
            h = block(h)
        return self.last(self.norm(h)).transpose(1, 2).unflatten(2, x.shape[2:])
