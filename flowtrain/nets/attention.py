"""Attention over tokens, in blocks, and as a conditioner of autoregressive maps."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.initial import random_normal, zero_init
from flowtrain.nets.mlp import check_at_least_one, context_layer
from flowtrain.nets.norm import Dropout
from flowtrain.runtime import modes


class CausalTransformer(nn.Module):
    """(B, D) -> (B, D, out), row i a function of the elements before i: causal self-attention over the elements
    (Vaswani et al. 2017), in pre-normalized blocks. For tokens of n numbers, (B, D, n) -> (B, D, n, out), row i is a
    function of the tokens before i (Zhai et al. 2024).

    The output is added to a learned row for each position; both are zero at the start.

    Args:
        shape: (D,), or (D, n).
        out: parameters per number.
        hidden: channels.
        depth: number of blocks.
        heads: of the attention.
        expand: width of the feed-forward layers, in multiples of ``hidden``.
        dropout: probability.
        offsets: position i reads the elements i − o for o in ``offsets``, 0 where there is none. [1], the default, is
            the previous element; [1, 8, 7] in an image 8 pixels wide are the left, upper and upper right neighbours.
        context_shape: (C,), or None. A linear map of the context is added at every position.

    Raises:
        ValueError: ``shape`` is neither a vector's nor that of tokens, a size below 1, ``hidden`` not a multiple of
            ``heads``, or an offset below 1.

    >>> CausalTransformer((6,), out=2)(torch.randn(5, 6)).shape
    torch.Size([5, 6, 2])
    >>> CausalTransformer((6, 4), out=2)(torch.randn(5, 6, 4)).shape
    torch.Size([5, 6, 4, 2])
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
        if len(shape) not in (1, 2):
            raise ValueError(f"a causal transformer takes vectors or tokens, not {list(shape)}; flatten first")
        check_at_least_one(hidden=hidden, depth=depth, heads=heads, expand=expand)
        self.offsets = list(offsets or [1])
        if min(self.offsets) < 1:
            raise ValueError(f"offsets={self.offsets} must be at least 1: an element cannot see itself")
        self.length, *token = shape
        self.row = (*token, out)  # of the output
        self.embed = nn.Linear(len(self.offsets) * prod(token), hidden)
        self.position = nn.Parameter(random_normal(self.length, hidden, std=0.05))
        self.context = context_layer(hidden, context_shape)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(hidden, heads, expand, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.last = zero_init(nn.Linear(hidden, prod(self.row)))
        self.bias = nn.Parameter(torch.zeros(self.length, prod(self.row)))

    def forward(self, x, context=None):
        x = x.flatten(2) if x.dim() > 2 else x[..., None]
        before = [F.pad(x, (0, 0, offset, 0))[:, : self.length] for offset in self.offsets]
        tokens = self.embed(torch.cat(before, 2)) + self._constant(context)
        return self._rows(tokens, self.bias, [None] * len(self.blocks))

    def _constant(self, context):
        """What is added at each position, whatever the elements are: (D, hidden), or (B, D, hidden) with a context."""
        return self.position if self.context is None else self.position + self.context(context)[:, None]

    def init_cache(self, x: Tensor, context: Tensor | None = None) -> dict:
        """An empty key/value cache for a pass over the elements of a batch like x (B, D) or (B, D, n)."""
        constant = self._constant(context)
        return {
            "elements": [],
            "constant": constant,
            "constants": constant.split(1, -2),
            "biases": self.bias.split(1),
            "blocks": [_Store(self.length) for _ in self.blocks],
        }

    def step(self, x: Tensor, cache: dict) -> Tensor:
        """The next element's row, (B, 1, *row), from the newest element, (B, 1, …), or none, (B, 0, …); extends
        ``cache``."""
        x, elements = x.flatten(2) if x.dim() > 2 else x[..., None], cache["elements"]
        if x.shape[1]:
            elements.append(x)
        i = len(elements)
        before = [
            elements[i - offset] if offset <= i else x.new_zeros(x.shape[0], 1, x.shape[2]) for offset in self.offsets
        ]
        token = before[0] if len(before) == 1 else torch.cat(before, 2)
        return self._rows(self.embed(token) + cache["constants"][i], cache["biases"][i], cache["blocks"])

    def look(self, x: Tensor, window: slice, cache: dict) -> Tensor:
        """The rows of a window of elements, (B, m, *row), given x (B, D, …), of which those before the window are what
        ``cache`` has seen. What it sees now replaces what it saw of the window and of all after it."""
        x = x.flatten(2) if x.dim() > 2 else x[..., None]
        most = max(self.offsets)
        padded = F.pad(x[:, : window.stop], (0, 0, most, 0))
        before = [padded[:, window.start + most - offset : window.stop + most - offset] for offset in self.offsets]
        for store in cache["blocks"]:
            store.length = window.start
        tokens = self.embed(torch.cat(before, 2)) + cache["constant"][..., window, :]
        return self._rows(tokens, self.bias[window], cache["blocks"])

    def _rows(self, h, bias, caches):
        if self.training:
            h = self.dropout(h)
        for block, cache in zip(self.blocks, caches):
            h = block(h, cache)
        return (self.last(self.norm(h)) + bias).unflatten(2, self.row)


class _Store:
    """Keys and values of the tokens so far, (2, B, heads, tokens, channels), in memory for all ``total`` of them from
    the start. Where gradients are needed, or the steps become a program, they are concatenated: nothing is
    overwritten."""

    def __init__(self, total: int):
        self.total, self.length = total, 0
        self.grows = torch.is_grad_enabled() or not modes.values_are_known()
        self.whole: Tensor | None = None

    def append(self, new: Tensor) -> Tensor:
        """All so far, with those of the newest tokens at their end."""
        if self.grows:
            self.whole = new if self.whole is None else torch.cat((self.whole, new), 3)
            return self.whole
        if self.whole is None:
            self.whole = new.new_empty(*new.shape[:3], self.total, new.shape[4])
        start, self.length = self.length, self.length + new.shape[3]
        self.whole.narrow(3, start, self.length - start).copy_(new)
        return self.whole.narrow(3, 0, self.length)


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, pre-normalized, each added to its input (Vaswani et al. 2017): (B, tokens,
    hidden) -> the same shape.

    Args:
        causal: each token sees those before it and itself; else all of them.

    Raises:
        ValueError: ``hidden`` is no multiple of ``heads``.
    """

    gathers_alone = True  # see flowtrain.engine.sharded_weights

    def __init__(self, hidden: int, heads: int, expand: int, dropout: float, causal: bool = True):
        super().__init__()
        check_heads(hidden, heads)
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_feed = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query_key_value, self.attention_out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.feed = nn.Linear(hidden, expand * hidden)
        self.feed_out = nn.Linear(expand * hidden, hidden)
        self.dropout = Dropout(dropout)

    def forward(self, h, cache=None):
        """``cache``, if given, holds the keys and values of the tokens before those of h, and is extended."""
        attention = attend(self.query_key_value(self.norm_attention(h)), self.heads, self.causal, cache)
        drop = self.dropout if self.training else _same
        h = h + drop(self.attention_out(attention))
        return h + drop(self.feed_out(drop(F.gelu(self.feed(self.norm_feed(h))))))


def check_heads(hidden: int, heads: int) -> None:
    """ValueError if ``hidden`` channels cannot be shared among the heads."""
    if hidden % heads:
        raise ValueError(f"hidden={hidden} is not a multiple of heads={heads}")


def attend(query_key_value: Tensor, heads: int, causal: bool = False, cache: _Store | None = None) -> Tensor:
    """Attention of ``heads`` heads: queries, keys and values (B, tokens, 3·hidden) -> (B, tokens, hidden). With a
    ``cache`` the tokens see those that it holds too, in order."""
    three = query_key_value.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    query, mask = three[0], None
    if cache is None:
        key, value = three[1:]
    else:
        key, value = cache.append(three[1:])
        if (new := query.shape[2]) > 1:
            mask = torch.ones(new, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - new)
    attention = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal and cache is None)
    return attention.transpose(1, 2).flatten(2)


def _same(h: Tensor) -> Tensor:
    return h
