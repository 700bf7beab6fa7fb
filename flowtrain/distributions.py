"""Standard base distributions: densities without parameters that a flow maps data to."""

from __future__ import annotations

import math
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distribution(nn.Module):
    """A distribution of events of ``shape``, its coordinates independent and alike."""

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats of each of ``z`` (B, *shape): (B,)."""
        return self.log_density(z).flatten(1).sum(1)

    def log_density(self, z: Tensor) -> Tensor:
        """Log-density of each coordinate, of z's shape."""
        raise NotImplementedError

    def draw(self, shape, **where) -> Tensor:
        """Coordinates drawn at temperature 1; ``where`` holds generator, device and dtype."""
        raise NotImplementedError

    def sample(self, n: int, temperature: float = 1.0, **where) -> Tensor:
        """(n, *shape), each coordinate multiplied by ``temperature``."""
        return temperature * self.draw((n, *self.shape), **where)


class StandardNormal(Distribution):
    """N(0, I)."""

    def log_prob(self, z, context=None):
        # one reduction over the squares; the constant is added once
        return -0.5 * (z.square().flatten(1).sum(1) + prod(self.shape) * math.log(2 * math.pi))

    def log_density(self, z):
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def draw(self, shape, **where):
        return torch.randn(shape, **where)


class Logistic(Distribution):
    """The logistic distribution with location 0 and scale 1, NICE's prior (Dinh et al. 2015, section 3.4)."""

    def log_density(self, z):
        return -F.softplus(z) - F.softplus(-z)

    def draw(self, shape, **where):
        # rand can return 0, whose logit is infinite
        u = torch.rand(shape, **where).clamp(min=torch.finfo(torch.float32).tiny)
        return u.log() - torch.log1p(-u)
