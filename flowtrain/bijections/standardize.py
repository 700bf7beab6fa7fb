"""The first layer of a field's flow. Its buffers hold the moments of the train split."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision
from flowtrain.bijections.norm import per_channel


class StandardizeChannels(Bijection):
    """z = (x − mean)/std in each channel, with the train split's mean and std, which ``fit`` sets.

    x and z are (B, C, …); the channels of a vector (D,) are its D numbers. The log-determinant is −pixels · Σ log std,
    so log p stays the density of x in its own units.

    >>> layer = StandardizeChannels((2, 4, 4))
    >>> layer.fit(None, 5 + 3 * torch.randn(100, 2, 4, 4))
    >>> layer(torch.full((1, 2, 4, 4), 5.0))[0].abs().max() < 0.1
    tensor(True)
    """

    reversible = True
    mean: Tensor
    std: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.pixels = math.prod(self.shape[1:])
        self.register_buffer("mean", torch.zeros(self.shape[0]))
        self.register_buffer("std", torch.ones(self.shape[0]))

    @torch.no_grad()
    def fit(self, columns, rows: Tensor) -> None:
        """Set the moments from rows (N, *shape) of the train split; ``columns``, of a table, are not used.

        Raises:
            ValueError: a channel has the same value in all rows, so it has no density.
        """
        axes = [0, *range(2, rows.dim())]
        std, mean = torch.std_mean(rows.double(), axes, correction=0)
        constant = rows.amin(axes) == rows.amax(axes)
        if constant.any():
            channel = int(constant.nonzero()[0])
            what = f"{'number' if rows.dim() == 2 else 'channel'} {channel}"
            raise ValueError(f"needs values that differ: {what} is constant in {len(rows):,} training examples")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, x, context=None):
        with full_precision(x):
            z = (x - per_channel(self.mean, x)) / per_channel(self.std, x)
            return z, constant_log_det(-self.pixels * self.std.log().sum(), x)

    def log_derivatives(self, x, context=None):
        return self(x)[0], -per_channel(self.std, x).log().expand_as(x)

    def inverse(self, z, context=None):
        with full_precision(z):
            x = z * per_channel(self.std, z) + per_channel(self.mean, z)
            return x, constant_log_det(self.pixels * self.std.log().sum(), z)
