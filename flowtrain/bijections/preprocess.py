"""From raw data to real numbers near 0: the first layers of a flow, so that log_prob is the density of the raw data."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, size, sum_event, zero_log_det
from flowtrain.runtime import global_batch, modes


class Dequantize(Bijection):
    """Integers x in 0 … grey_levels − 1 to (x + u)/grey_levels in [0, 1), u uniform (Theis et al. 2016, section 3.1).

    The log-determinant is −D·log(grey_levels), since the density of u is 1. So E[log p] is a lower bound of log P(x).
    ``inverse`` rounds down to the integer whose bin holds the value: uint8 up to 256 grey levels, int64 above. An input
    that is not one of these integers becomes NaN.

    Raises:
        ValueError: ``grey_levels`` is None, as that of real numbers is, or below 2.
        FloatingPointError: in ``inverse``, for NaN, which no integer can represent.

    >>> layer = Dequantize((2,), grey_levels=256)
    >>> layer.inverse(layer(torch.tensor([[0, 255]]))[0])[0]
    tensor([[  0, 255]], dtype=torch.uint8)
    """

    exact = False
    anchor: Tensor

    def __init__(self, shape, grey_levels: int, context_shape=None):
        super().__init__(shape, context_shape)
        if grey_levels is None:
            raise ValueError("this preprocessing needs integer data; these are real numbers")
        if grey_levels < 2:
            raise ValueError(f"grey_levels={grey_levels} must be at least 2")
        self.grey_levels = int(grey_levels)
        self.log_det = -size(self.shape) * math.log(grey_levels)
        self.integers = torch.uint8 if grey_levels <= 256 else torch.int64
        # not a parameter: it makes .double() and .to(device) reach this layer
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def forward(self, x, context=None):
        x = x.to(self.anchor.dtype)
        u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype)
        return self.into_bin(x, u), zero_log_det(x) + self.log_det

    def into_bin(self, x: Tensor, noise: Tensor) -> Tensor:
        """(x + noise)/grey_levels, inside the bin of x; NaN where x is none of the integers."""
        # x + noise sometimes rounds up to x + 1, and the division and its inverse round too: stay two roundings inside
        # the bin, or decoding returns another integer
        margin = 2 * torch.finfo(x.dtype).eps
        y = torch.clamp(x + noise, x * (1 + margin), (x + 1) * (1 - margin)) / self.grey_levels
        return torch.where(x == x.floor().clamp(0, self.grey_levels - 1), y, math.nan)

    def log_derivatives(self, x, context=None):
        z, _ = self(x)
        return z, torch.full_like(z, -math.log(self.grey_levels))

    def inverse(self, z, context=None):
        if modes.values_are_known() and z.isnan().any():
            raise FloatingPointError("integers of what is not a number")
        x = (z * self.grey_levels).floor().clamp(0, self.grey_levels - 1)
        return x.to(self.integers), zero_log_det(z) - self.log_det


class Center(Bijection):
    """z = x − ½: [0, 1] to [−½, ½].

    >>> Center((2,))(torch.tensor([[0.0, 1.0]]))[0]
    tensor([[-0.5000,  0.5000]])
    """

    reversible = True

    def forward(self, x, context=None):
        return x - 0.5, zero_log_det(x)

    def log_derivatives(self, x, context=None):
        return x - 0.5, torch.zeros_like(x)

    def inverse(self, z, context=None):
        return z + 0.5, zero_log_det(z)


class Logit(Bijection):
    """z = logit(alpha + (1 − 2·alpha)·x): [0, 1] to the real line (Dinh et al. 2017, section 4.1).

    With alpha = 0 the ends, which dequantized values can reach, map to ±∞: values are kept half a rounding away from
    them. An input outside [0, 1] becomes NaN, since clamping would map many points to one.

    Raises:
        ValueError: ``alpha`` outside [0, ½).

    >>> Logit((1,))(torch.tensor([[0.5]]))[0]
    tensor([[0.]])
    """

    reversible = False  # a recomputed input may lie just outside [0, 1]

    def __init__(self, shape, alpha: float = 0.05, context_shape=None):
        super().__init__(shape, context_shape)
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha={alpha} must be at least 0 and below 0.5")
        self.alpha = alpha

    def forward(self, x, context=None):
        z, log_derivative = self.log_derivatives(x)
        return z, sum_event(log_derivative)

    def log_derivatives(self, x, context=None):
        margin = torch.finfo(x.dtype).eps / 2
        p = (self.alpha + (1 - 2 * self.alpha) * x).clamp(margin, 1 - margin)
        z = torch.where((x >= 0) & (x <= 1), p.log() - torch.log1p(-p), math.nan)
        return z, self._log_derivative(z)

    def inverse(self, z, context=None):
        x = (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)
        return x, -sum_event(self._log_derivative(z))

    def _log_derivative(self, z):
        return math.log(1 - 2 * self.alpha) + F.softplus(z) + F.softplus(-z)
