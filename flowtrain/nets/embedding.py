"""Embeddings: networks that make a vector of a context, for a flow that is conditional on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.nets.mlp import check_at_least_one
from flowtrain.runtime.global_batch import uniform

FLATTEN_AT = 4  # longest side of a map whose numbers go into the last layer


class MLPEmbedding(nn.Module):
    """A vector (B, n) -> (B, features): ``depth`` hidden layers of ``hidden`` rectified units.

    Args:
        context_shape: (n,).
        features: numbers of the output.
        hidden, depth: units of a hidden layer, and hidden layers.

    Raises:
        ValueError: ``context_shape`` is not a vector's, or a size is below 1.

    >>> MLPEmbedding((3,), features=4)(torch.randn(5, 3)).shape
    torch.Size([5, 4])
    """

    def __init__(self, context_shape, features: int = 32, hidden: int = 64, depth: int = 2):
        super().__init__()
        if len(context_shape) != 1:
            raise ValueError(
                f"mlp takes a context vector, not {list(context_shape)}; conv takes images, deep_set takes sets"
            )
        check_at_least_one(features=features, hidden=hidden, depth=depth)
        self.layers = _mlp(context_shape[0], hidden, depth, features)
        self.out_shape = (features,)

    def forward(self, context: Tensor) -> Tensor:
        return self.layers(context)


class ConvEmbedding(nn.Module):
    """Images (B, C, H, W) or series (B, C, L) -> (B, features).

    A convolution of width 3, then one for each time that the longest side is halved down to 4. The first has ``hidden``
    channels, each other twice those of the one before, up to 8·``hidden``. A linear layer reads all that is left, so
    that places count.

    Args:
        context_shape: (C, H, W), (C, L), or that of a vector if there is a ``view``.
        features: numbers of the output.
        hidden: channels of the first convolution.
        view: (C, H, W) or (C, L) as which a context vector is read.

    Raises:
        ValueError: a context of another shape, or a size below 1.

    >>> ConvEmbedding((3, 16, 12), features=4)(torch.randn(5, 3, 16, 12)).shape
    torch.Size([5, 4])
    """

    def __init__(self, context_shape, features: int = 32, hidden: int = 32, view=None):
        super().__init__()
        self.shape = _viewed("conv", context_shape, view, {3: "[channels, height, width]", 2: "[channels, length]"})
        check_at_least_one(features=features, hidden=hidden)
        kind = nn.Conv2d if len(self.shape) == 3 else nn.Conv1d
        channels, *sides = self.shape
        layers: list[nn.Module] = [kind(channels, hidden, 3, padding=1), nn.ReLU()]
        wide = hidden
        while max(sides) > FLATTEN_AT:
            wide, before = min(2 * wide, 8 * hidden), wide
            layers += [kind(before, wide, 3, stride=2, padding=1), nn.ReLU()]
            sides = [-(-side // 2) for side in sides]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(wide * prod(sides), features))
        self.out_shape = (features,)

    def forward(self, context: Tensor) -> Tensor:
        return self.layers(context.reshape(-1, *self.shape))


class DeepSet(nn.Module):
    """Sets (B, n, d) of up to n points of d numbers -> (B, features), the same for any order of the points:
    ρ(mean of φ(point), share of n), with networks φ and ρ (Zaheer et al. 2017, theorem 2).

    A set of fewer points ends with rows of NaN, or has them anywhere; a row with a NaN is no point.

    Args:
        context_shape: (n, d), or that of a vector if there is a ``view``.
        features: numbers of the output.
        hidden, depth: units of a hidden layer, and hidden layers, of φ and of ρ.
        view: (n, d) as which a context vector is read, one point after the other.

    Raises:
        ValueError: a context of another shape, or a size below 1.

    >>> points = torch.randn(5, 10, 2)
    >>> points[0, 7:] = torch.nan  # a set of seven
    >>> DeepSet((10, 2), features=4)(points).shape
    torch.Size([5, 4])
    """

    def __init__(self, context_shape, features: int = 32, hidden: int = 64, depth: int = 2, view=None):
        super().__init__()
        self.shape = _viewed("deep_set", context_shape, view, {2: "[points, numbers of a point]"})
        check_at_least_one(features=features, hidden=hidden, depth=depth)
        self.point = _mlp(self.shape[1], hidden, depth, hidden)
        self.whole = _mlp(hidden + 1, hidden, depth, features)
        self.out_shape = (features,)

    def forward(self, context: Tensor) -> Tensor:
        points = context.reshape(-1, *self.shape)
        is_point = ~points.isnan().any(2, keepdim=True)
        each = self.point(self.hide_missing(points))
        count = is_point.sum(1)
        mean = torch.where(is_point, each, 0.0).sum(1) / count.clamp(min=1)
        return self.whole(torch.cat((mean, (count / self.shape[0]).to(mean.dtype)), 1))

    def hide_missing(self, context: Tensor) -> Tensor:
        """Contexts with 0 in place of NaN, which stands where there is no point."""
        return torch.where(context.isnan(), 0.0, context)


class HiddenContext(nn.Module):
    """The context (B, n), or what an ``embedding`` makes of it; in training 0 in its place for a random ``share`` of
    the examples, so that one flow learns the density with the context and that without (Ho & Salimans 2021).

    Args:
        context_shape: (n,), or what ``embedding`` takes.
        share: probability that a context is hidden.
        embedding: a module, or a factory called with ``context_shape``, with an ``out_shape``; or None.

    Raises:
        ValueError: ``share`` outside [0, 1), or what the embedding refuses.

    >>> HiddenContext((3,), share=0.1).eval()(torch.ones(1, 3))
    tensor([[1., 1., 1.]])
    """

    def __init__(self, context_shape, share: float, embedding: Callable[..., nn.Module] | nn.Module | None = None):
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"hide_context={share} must be at least 0 and below 1")
        self.share = share
        net: Any = embedding if embedding is None or isinstance(embedding, nn.Module) else embedding(context_shape)
        self.embedding = net
        self.out_shape = tuple(context_shape if net is None else net.out_shape)

    def forward(self, context: Tensor) -> Tensor:
        context = context if self.embedding is None else self.embedding(context)
        if not self.training or self.share == 0:
            return context
        each = (len(context), *[1] * (context.dim() - 1))
        return context * (uniform(each, context.device) >= self.share).to(context.dtype)

    def hide_missing(self, context: Tensor) -> Tensor:
        """Contexts with 0 in place of what the embedding takes for missing."""
        return getattr(self.embedding, "hide_missing", lambda whole: whole)(context)


def _mlp(inputs: int, hidden: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, *[hidden] * (depth - 1)):
        layers += [nn.Linear(width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def _viewed(name: str, context_shape, view, wanted: dict[int, str]) -> tuple[int, ...]:
    """The shape that a network reads contexts in: ``view``, else theirs. ``wanted``: rank -> what its axes are."""
    options = " or ".join(wanted.values())
    if view is None:
        if len(context_shape) not in wanted:
            what = "a vector" if len(context_shape) == 1 else list(context_shape)
            hint = f"; view={options} reads a vector so" if len(context_shape) == 1 else ""
            raise ValueError(f"{name} takes contexts of shape {options}, not {what}{hint}")
        return tuple(context_shape)
    found = tuple(view) if isinstance(view, Sequence) else (view,)
    are_sizes = all(isinstance(size, int) and size > 0 for size in found)
    if len(found) not in wanted or not are_sizes or prod(found) != prod(context_shape):
        raise ValueError(
            f"view={list(found)}: must be {options}, of {prod(context_shape)} numbers in all, which a context has"
        )
    return found
