"""Base distributions: the distributions of a flow's latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distribution(nn.Module):
    """A distribution of events of ``shape``, which may depend on a context of ``context_shape``.

    Its parameters, if any, are learned with the flow's.

    Args:
        shape: of one event, without the batch.
        context_shape: of the context of one event, or None.
    """

    def __init__(self, shape, context_shape=None):
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        self.context_shape = None if context_shape is None else tuple(int(n) for n in context_shape)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, (B,), of ``z`` (B, *shape) given ``context`` (B, *context_shape)."""
        raise NotImplementedError

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n samples, (n, *shape), one for each row of ``context`` (n, *context_shape) if they depend on it.

        ``temperature`` multiplies each sample's distance from its mean. The noise does not depend on it, and is drawn
        on the CPU from ``generator``: a seed gives the same noise at every temperature and on every device.
        """
        raise NotImplementedError


class Standard(Distribution):
    """Independent, identically distributed coordinates around 0, without parameters."""

    def log_prob(self, z, context=None):
        return self.log_density(z).flatten(1).sum(1)

    def sample(self, n, temperature=1.0, context=None, generator=None):
        return temperature * self.noise((n, *self.shape), generator)

    def log_density(self, z: Tensor) -> Tensor:
        """Log-density of each coordinate: (B, *shape)."""
        raise NotImplementedError

    def noise(self, shape, generator: torch.Generator | None) -> Tensor:
        """Samples of coordinates at temperature 1."""
        raise NotImplementedError


class StandardNormal(Standard):
    """N(0, I).

    >>> StandardNormal((2,)).log_prob(torch.zeros(1, 2))
    tensor([-1.8379])
    """

    def log_prob(self, z, context=None):
        # one reduction over the squares; the constant is added once
        return -0.5 * (z.square().flatten(1).sum(1) + prod(self.shape) * math.log(2 * math.pi))

    def log_density(self, z):
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def noise(self, shape, generator):
        return _normal(shape, generator)


class Logistic(Standard):
    """The logistic distribution with location 0 and scale 1: NICE's prior (Dinh et al. 2015, section 3.4).

    >>> Logistic((2,)).log_prob(torch.zeros(1, 2))
    tensor([-2.7726])
    """

    def log_density(self, z):
        return -F.softplus(z) - F.softplus(-z)

    def noise(self, shape, generator):
        # rand can return 0, whose logit is infinite
        u = torch.rand(shape, generator=generator, device="cpu").clamp(min=torch.finfo(torch.float32).tiny)
        return u.log() - torch.log1p(-u)


class ConditionalNormal(Distribution):
    """N(μ(c), diag σ(c)²), with μ and log σ affine functions of the context vector c, 0 at the start.

    With one-hot labels as context it has a mean and a diagonal covariance for each class.

    Raises:
        ValueError: ``context_shape`` is not that of a vector; in ``log_prob`` and ``sample``, no context.

    >>> ConditionalNormal((2,), context_shape=(3,)).sample(5, context=torch.eye(3)[[0, 1, 2, 0, 1]]).shape
    torch.Size([5, 2])
    """

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        if self.context_shape is None:
            raise ValueError("context_shape=null: a conditional normal needs a context; nothing here gives one")
        if len(self.context_shape) != 1:
            raise ValueError(f"context_shape={list(self.context_shape)}: a conditional normal takes a context vector")
        self.affine = nn.Linear(*self.context_shape, 2 * prod(self.shape))
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def moments(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log of the standard deviation for each row of ``context``, both (B, *shape)."""
        if context is None:
            raise ValueError(f"a conditional normal needs a context (B, {self.context_shape[0]})")
        with torch.autocast(context.device.type, enabled=False):
            return self.affine(context.to(self.affine.weight.dtype)).unflatten(1, (2, *self.shape)).unbind(1)

    def log_prob(self, z, context=None):
        return _normal_log_density(z, *self.moments(context)).flatten(1).sum(1)

    def sample(self, n, temperature=1.0, context=None, generator=None):
        mean, log_scale = self.moments(context)
        if len(mean) != n:
            raise ValueError(f"{n} draws need a context of {n} rows, not {len(mean)}")
        return mean + temperature * log_scale.exp() * _normal((n, *self.shape), generator).to(mean)


class Mixture(Distribution):
    """Σₖ wₖ N(μₖ, diag σₖ²) with learned weights, means and scales.

    At the start the means are drawn from N(0, spread²) and every variance is 1 − spread². So the components differ, and
    the mixture has about the moments of N(0, I). Temperature scales a sample's distance from the mean of its component.

    Args:
        shape: of one event.
        components: number of normals.
        spread: standard deviation of the means at the start.
        context_shape: not used.

    Raises:
        ValueError: ``components`` below 1, or ``spread`` outside [0, 1).

    >>> Mixture((2,), components=3).sample(5).shape
    torch.Size([5, 2])
    """

    def __init__(self, shape, components: int = 10, spread: float = 0.8, context_shape=None):
        super().__init__(shape, context_shape)
        if components < 1:
            raise ValueError(f"components={components} must be at least 1")
        if not 0 <= spread < 1:
            raise ValueError(f"spread={spread} must lie in [0, 1)")
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(spread * torch.randn(components, *self.shape))
        self.log_scale = nn.Parameter(torch.full((components, *self.shape), 0.5 * math.log1p(-(spread**2))))

    def log_prob(self, z, context=None):
        each = _normal_log_density(z[:, None], self.mean, self.log_scale).flatten(2).sum(2)
        return torch.logsumexp(each + self.logits.log_softmax(0), 1)

    def sample(self, n, temperature=1.0, context=None, generator=None):
        weights = self.logits.detach().float().softmax(0).cpu()
        index = torch.multinomial(weights, n, replacement=True, generator=generator).to(self.mean.device)
        noise = _normal((n, *self.shape), generator).to(self.mean)
        return self.mean[index] + temperature * self.log_scale[index].exp() * noise


class Joint(Distribution):
    """Independent distributions of vectors, side by side in one vector.

    Args:
        shape: of one event, (D,).
        parts: the distributions, in order, of D coordinates together.
        context_shape: of the context of all parts, or None.

    Raises:
        ValueError: the parts do not have D coordinates.

    >>> Joint((3,), [Logistic((2,)), StandardNormal((1,))]).sample(5).shape
    torch.Size([5, 3])
    """

    def __init__(self, shape, parts: Sequence[Distribution], context_shape=None):
        super().__init__(shape, context_shape)
        self.sizes = [prod(part.shape) for part in parts]
        if self.shape != (sum(self.sizes),):
            raise ValueError(f"parts of {self.sizes} coordinates do not make up a shape of {list(self.shape)}")
        self.parts = nn.ModuleList(parts)

    def log_prob(self, z, context=None):
        return sum(part.log_prob(piece, context) for part, piece in zip(self.parts, z.split(self.sizes, 1)))

    def sample(self, n, temperature=1.0, context=None, generator=None):
        drawn = [part.sample(n, temperature, context, generator) for part in self.parts]
        return torch.cat([part.to(drawn[0]) for part in drawn], 1)


def _normal(shape, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


def _normal_log_density(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-density of each coordinate of N(mean, exp(log_scale)²); the arguments broadcast."""
    return -0.5 * ((z - mean) * torch.exp(-log_scale)).square() - log_scale - 0.5 * math.log(2 * math.pi)
