"""Attention as a conditioner of autoregressive maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.mlp import check_at_least_one, context_layer, zero_init
from flowtrain.nets.norm import Dropout


class CausalTransformer(nn.Module):
    """(B, D) -> (B, D, out), row i a function of the elements before i: causal self-attention over the elements
    (Vaswani et al. 2017), in pre-normalized blocks.

    The output is added to a learned row for each position; both are zero at the start.

    Args:
        shape: (D,).
        out: parameters per element.
        hidden: channels.
        depth: number of blocks.
        heads: of the attention.
        expand: width of the feed-forward layers, in multiples of ``hidden``.
        dropout: probability.
        offsets: token i holds the elements i − o for o in ``offsets``, 0 where there is none. [1], the default, is the
            previous element; [1, 8, 7] in an image 8 pixels wide are the left, upper and upper right neighbours.
        context_shape: (C,), or None. A linear map of the context is added to every token.

    Raises:
        ValueError: ``shape`` is not a vector's, a size below 1, ``hidden`` not a multiple of ``heads``, or an offset
            below 1.

    >>> CausalTransformer((6,), out=2)(torch.randn(5, 6)).shape
    torch.Size([5, 6, 2])
    """

    def __init__(
        self,
        shape,
        out: int,
        hidden: int = 64,
        depth: int = 2,
        heads: int = 4,
        expand: int = 2,
        dropout: float = 0.0,
        offsets: list[int] | None = None,
        context_shape=None,
    ):
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"a causal transformer takes vectors, not {list(shape)}; flatten first")
        check_at_least_one(hidden=hidden, depth=depth, heads=heads, expand=expand)
        if hidden % heads:
            raise ValueError(f"hidden={hidden} is not a multiple of heads={heads}")
        self.offsets = list(offsets or [1])
        if min(self.offsets) < 1:
            raise ValueError(f"offsets={self.offsets} must be at least 1: an element cannot see itself")
        (dimensions,) = shape
        self.embed = nn.Linear(len(self.offsets), hidden)
        self.position = nn.Parameter(0.05 * torch.randn(dimensions, hidden))
        self.context = context_layer(hidden, context_shape)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden, heads, expand, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.last = zero_init(nn.Linear(hidden, out))
        self.bias = nn.Parameter(torch.zeros(dimensions, out))

    def forward(self, x, context=None):
        before = [F.pad(x, (offset, 0))[:, : x.shape[1]] for offset in self.offsets]
        return self._rows(torch.stack(before, -1), slice(None), [None] * len(self.blocks), context)

    def init_cache(self, x: Tensor, context: Tensor | None = None) -> dict:
        """An empty key/value cache for a pass over the elements of a batch like x (B, D)."""
        return {"elements": x[:, :0], "context": context, "blocks": [{} for _ in self.blocks]}

    def step(self, x: Tensor, cache: dict) -> Tensor:
        """The next element's row, (B, 1, out), from the newest element, (B, 1), or none, (B, 0); extends ``cache``."""
        cache["elements"] = elements = torch.cat((cache["elements"], x), 1)
        i, none = elements.shape[1], elements.new_zeros(elements.shape[0])
        token = torch.stack([elements[:, i - offset] if offset <= i else none for offset in self.offsets], -1)
        return self._rows(token[:, None], slice(i, i + 1), cache["blocks"], cache["context"])

    def _rows(self, tokens, where, caches, context):
        h = self.embed(tokens) + self.position[where]
        if self.context is not None:
            h = h + self.context(context)[:, None]
        h = self.dropout(h)
        for block, cache in zip(self.blocks, caches):
            h = block(h, cache)
        return self.last(self.norm(h)) + self.bias[where]


class _Block(nn.Module):
    def __init__(self, hidden, heads, expand, dropout):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query_key_value, self.attention_out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.feed = nn.Linear(hidden, expand * hidden)
        self.feed_out = nn.Linear(expand * hidden, hidden)
        self.dropout = Dropout(dropout)

    def forward(self, h, cache=None):
        """h (B, tokens, hidden) -> the same shape. ``cache``, if given, holds the keys and values of the tokens before
        those of h, and is extended."""
        query, key, value = (
            self.query_key_value(self.norm_attention(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        if cache is not None:
            if cache:
                key, value = torch.cat((cache["key"], key), 2), torch.cat((cache["value"], value), 2)
            cache.update(key=key, value=value)
        attention = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        h = h + self.dropout(self.attention_out(attention.transpose(1, 2).flatten(2)))
        return h + self.dropout(self.feed_out(self.dropout(F.gelu(self.feed(self.norm_feed(h))))))
