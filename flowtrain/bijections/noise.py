"""Integers with normal noise: a flow learns a smoother density, and its score takes the noise off its samples."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from flowtrain.bijections.bijection import sum_event, zero_log_det
from flowtrain.bijections.preprocess import Dequantize
from flowtrain.runtime import global_batch, modes


def with_noise() -> AbstractContextManager[None]:
    """Within it, :class:`AddNoise` keeps noisy data as they are, in both directions."""
    return modes.using(noisy=True)


class AddNoise(Dequantize):
    """Integers x in 0 … grey_levels − 1 to y = 2(x + ½)/grey_levels − 1 + scale·ε, ε standard normal, around [−1, 1]:
    the noise-augmented training of TarFlow (Zhai et al. 2024).

    The flow learns the density of y, which is smooth where the noise is wider than a bin. With it comes a distribution
    of integers: given y, x has the probability that a normal variable around y, given that it falls into [−1, 1], falls
    into x's bin. The log-determinant is Σ log P(xᵢ | yᵢ) − log q(yᵢ | xᵢ), so that E[log p] is a lower bound of
    log P(x).

    ``inverse`` rounds to the integer whose bin holds the value. Within :func:`with_noise` the layer is the identity of
    noisy data y.

    Args:
        shape: of one event.
        grey_levels: of the integers.
        scale: standard deviation of the noise, where the data span [−1, 1].
        context_shape: not used.

    Raises:
        ValueError: ``grey_levels`` is None, as that of real numbers is, or below 2; ``scale`` not above 0.
        FloatingPointError: in ``inverse``, for NaN, which no integer can represent.

    >>> layer = AddNoise((2,), grey_levels=256, scale=0.001)
    >>> layer.inverse(layer(torch.tensor([[0, 255]]))[0])[0].shape
    torch.Size([1, 2])
    """

    def __init__(self, shape, grey_levels: int, scale: float = 0.05, context_shape=None):
        super().__init__(shape, grey_levels, context_shape)
        if not scale > 0:
            raise ValueError(f"scale={scale} must be above 0")
        self.scale = float(scale)

    def forward(self, x, context=None):
        if modes.current().noisy:
            return x, zero_log_det(x)
        y, log_derivative = self.log_derivatives(x)
        return y, sum_event(log_derivative)

    def log_derivatives(self, x, context=None):
        x = x.to(self.anchor.dtype)
        u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype)
        margin = torch.finfo(x.dtype).eps / 2
        y = self._centre(x) + self.scale * torch.special.ndtri(u.clamp(margin, 1 - margin))
        y = torch.where(x == x.floor().clamp(0, self.grey_levels - 1), y, math.nan)
        return y, self._log_ratio(x, y)

    def inverse(self, z, context=None):
        if modes.current().noisy:
            return z, zero_log_det(z)
        if modes.values_are_known() and z.isnan().any():
            raise FloatingPointError("integers of what is not a number")
        x = ((z + 1) * (self.grey_levels / 2)).floor().clamp(0, self.grey_levels - 1)
        return x.to(self.integers), -sum_event(self._log_ratio(x, z))

    def _centre(self, x: Tensor) -> Tensor:
        return (2 * x + 1) / self.grey_levels - 1

    def _log_ratio(self, x: Tensor, y: Tensor) -> Tensor:
        """log P(x | y) − log q(y | x) of each number."""
        distance = (y - self._centre(x)).abs() / self.scale  # the same from both sides; the nearer end is exact
        half = 1 / (self.grey_levels * self.scale)
        inside = _log_mass(distance - half, distance + half)
        whole = _log_mass((y.abs() - 1) / self.scale, (y.abs() + 1) / self.scale)
        log_q = -0.5 * distance.square() - math.log(self.scale) - 0.5 * math.log(2 * math.pi)
        return inside - whole - log_q


def _log_mass(low: Tensor, high: Tensor) -> Tensor:
    """log P(low < Z < high) of a standard normal Z, for low > −high: the difference of the upper tails is accurate."""
    above = _log_upper(low)
    return above + torch.log(-torch.expm1(_log_upper(high) - above))


def _log_upper(t: Tensor) -> Tensor:
    """log P(Z > t)."""
    t = t / math.sqrt(2)
    far = t > 1
    near = torch.special.erfc(torch.where(far, 0.0, t)).log()
    return torch.where(far, torch.special.erfcx(torch.where(far, t, 1.0)).log() - t.square(), near) - math.log(2)
