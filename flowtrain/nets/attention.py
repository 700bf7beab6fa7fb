"""Attention as a conditioner of autoregressive maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.mlp import at_least_one, context_to, zeroed
from flowtrain.nets.norm import Dropout


class CausalTransformer(nn.Module):
    """(B, D) -> (B, D, out), row i a function of the elements before i: causal self-attention over the elements.

    Token i holds the elements i − o for o in ``offsets``, 0 where there is none: [1] is the one before; [1, 8, 7] in a
    image 8 wide the one to the left, above and above to the right. ``depth`` pre-normalized blocks of ``hidden``
    channels follow (Vaswani et al. 2017), the feed-forward part ``expand`` times as wide; what they say is added to a
    learned row for each position, both zero at the start.
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
        at_least_one(hidden=hidden, depth=depth, heads=heads, expand=expand)
        if hidden % heads:
            raise ValueError(f"hidden={hidden} is not a multiple of heads={heads}")
        self.offsets = list(offsets or [1])
        if min(self.offsets) < 1:
            raise ValueError(f"offsets={self.offsets} must be at least 1: an element cannot see itself")
        (dimensions,) = shape
        self.embed = nn.Linear(len(self.offsets), hidden)
        self.position = nn.Parameter(0.05 * torch.randn(dimensions, hidden))
        self.context = context_to(hidden, context_shape)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden, heads, expand, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.last = zeroed(nn.Linear(hidden, out))
        self.bias = nn.Parameter(torch.zeros(dimensions, out))

    def forward(self, x, context=None):
        before = [F.pad(x, (offset, 0))[:, : x.shape[1]] for offset in self.offsets]
        return self._rows(torch.stack(before, -1), slice(None), [None] * len(self.blocks), context)

    def begin(self, x: Tensor, context: Tensor | None = None) -> dict:
        """The cache of a pass over the elements of a batch like x: those so far, and each block's keys and values."""
        return {"elements": x[:, :0], "context": context, "blocks": [{} for _ in self.blocks]}

    def step(self, x: Tensor, memory: dict) -> Tensor:
        """The newest element, (B, 1), or none yet, (B, 0) -> (B, 1, out), the row of the next one."""
        memory["elements"] = elements = torch.cat((memory["elements"], x), 1)
        i, none = elements.shape[1], elements.new_zeros(len(elements))
        token = torch.stack([elements[:, i - offset] if offset <= i else none for offset in self.offsets], -1)
        return self._rows(token[:, None], slice(i, i + 1), memory["blocks"], memory["context"])

    def _rows(self, tokens, where, memory, context):
        h = self.embed(tokens) + self.position[where]
        if self.context is not None:
            h = h + self.context(context)[:, None]
        h = self.dropout(h)
        for block, kept in zip(self.blocks, memory):
            h = block(h, kept)
        return self.last(self.norm(h)) + self.bias[where]


class _Block(nn.Module):
    def __init__(self, hidden, heads, expand, dropout):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query_key_value, self.attended = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.feed = nn.Linear(hidden, expand * hidden)
        self.fed = nn.Linear(expand * hidden, hidden)
        self.dropout = Dropout(dropout)

    def forward(self, h, memory=None):
        """``memory`` holds the keys and values of earlier tokens, if h goes on after them; it is extended."""
        query, key, value = (
            self.query_key_value(self.norm_attention(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        if memory is not None:
            if memory:
                key, value = torch.cat((memory["key"], key), 2), torch.cat((memory["value"], value), 2)
            memory.update(key=key, value=value)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=memory is None)
        h = h + self.dropout(self.attended(attended.transpose(1, 2).flatten(2)))
        return h + self.dropout(self.fed(self.dropout(F.gelu(self.feed(self.norm_feed(h))))))
