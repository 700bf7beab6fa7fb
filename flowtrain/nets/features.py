"""Features of an event, the context of layers that depend on it: of an image they are an image again."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flowtrain.nets.mlp import check_at_least_one


class Features(nn.Module):
    """Images (B, C, H, W) -> (B, features, H/2, W/2), where both sides are even, else (B, features, H, W); vectors
    (B, n) -> (B, features).

    ``depth`` layers with rectifiers between them: 3×3 convolutions, the first of 4×4 and stride 2 where the sides are
    even; linear layers for vectors.

    Args:
        context_shape: (C, H, W) or (n,).
        features: numbers of the output, for each pixel, and of all layers.
        depth: layers.

    Raises:
        ValueError: events of another shape, or a size below 1.

    >>> import torch
    >>> Features((1, 8, 6), features=4)(torch.randn(5, 1, 8, 6)).shape
    torch.Size([5, 4, 4, 3])
    """

    def __init__(self, context_shape, features: int = 32, depth: int = 2):
        super().__init__()
        check_at_least_one(features=features, depth=depth)
        first, *sides = context_shape
        if len(sides) not in (0, 2):
            raise ValueError(f"features are of images (channels, height, width) or vectors, not {list(context_shape)}")
        layer = partial(nn.Conv2d, kernel_size=3, padding=1) if sides else nn.Linear
        layers = [layer(first if i == 0 else features, features) for i in range(depth)]
        if sides and not any(side % 2 for side in sides):
            layers[0] = nn.Conv2d(first, features, 4, stride=2, padding=1)
            sides = [side // 2 for side in sides]
        self.layers = nn.Sequential(*(part for one in layers for part in (one, nn.ReLU())))
        self.out_shape = (features, *sides)
        if sides:
            self.to(memory_format=torch.channels_last)

    def forward(self, context: Tensor) -> Tensor:
        return self.layers(context)
