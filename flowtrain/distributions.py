"""Base distributions: the distributions of a flow's latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.runtime import modes


class Noise(NamedTuple):
    """Independent random numbers for one event: "normal" (0, 1), "logistic" (0, 1) or "uniform" in [0, 1).

    >>> Noise("uniform", (3,)).draw(5).shape
    torch.Size([5, 3])
    """

    kind: str
    shape: tuple[int, ...]

    def draw(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers for n events, (n, *shape), on the CPU. Without a ``generator``, those of the rows of a global batch
        or of the examples at hand: see :mod:`flowtrain.runtime.global_batch`."""
        if torch.compiler.is_compiling() and generator is None:
            return torch.ops.flowtrain.noise(self.kind, (n, *self.shape), dtype)
        return _draw(self.kind, (n, *self.shape), dtype, generator)


def _draw(kind: str, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    mode = modes.current()
    if generator is None and mode.noise is not None:
        u = mode.noise.uniform(shape, dtype=torch.float64)
        return (u if kind == "uniform" else _quantile(kind, u.clamp(min=2.0**-54))).to(dtype)
    if generator is None and mode.global_rows is not None:
        rows = slice(mode.first_row, mode.first_row + shape[0])
        return _random(kind, (mode.global_rows, *shape[1:]), dtype, None)[rows]
    return _random(kind, shape, dtype, generator)


def _random(kind: str, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    if kind == "normal":
        return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    u = torch.rand(shape, generator=generator, dtype=dtype, device="cpu")
    # rand can return 0, whose logit is infinite
    return u if kind == "uniform" else _quantile(kind, u.clamp(min=torch.finfo(torch.float32).tiny))


def _quantile(kind: str, u: Tensor) -> Tensor:
    return u.log() - torch.log1p(-u) if kind == "logistic" else torch.special.ndtri(u)


@torch.library.custom_op("flowtrain::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _opaque(kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Opaque to a compiler, which would draw other numbers from the same seed."""
    return _draw(kind, shape, dtype)


@_opaque.register_fake
def _(kind, shape, dtype):
    return torch.empty(shape, dtype=dtype, device="cpu")


class Distribution(nn.Module):
    """A distribution of events of ``shape``, which may depend on a context of ``context_shape``.

    Its parameters, if any, are learned with the flow's. A subclass says of what ``noise`` its samples are made, and
    makes them in ``from_noise``; or it has a ``sample`` of its own, and then no sampler of its flows can be exported.

    Args:
        shape: of one event, without the batch.
        context_shape: of the context of one event, or None.

    Attributes:
        reparameterized: True if the gradient of its samples, as they are made from noise, is that of their
            distribution.
    """

    reparameterized = False
    _like: Tensor

    def __init__(self, shape, context_shape=None):
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        self.context_shape = None if context_shape is None else tuple(int(n) for n in context_shape)
        self.register_buffer("_like", torch.empty(0), persistent=False)  # whose dtype follows that of the flow

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, (B,), of ``z`` (B, *shape) given ``context`` (B, *context_shape)."""
        raise NotImplementedError

    def log_density(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of each coordinate, (B, *shape), whose sum is ``log_prob``. Raises NotImplementedError where the
        coordinates are not independent."""
        raise NotImplementedError

    @property
    def noise(self) -> tuple[Noise, ...]:
        """The noise of one sample. The parts that ``temperature`` scales have mean 0; uniform ones it leaves alone."""
        raise NotImplementedError

    def from_noise(self, noise: Sequence[Tensor], temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        """Samples, (n, *shape), from a tensor (n, …) for each of ``noise``."""
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
        on the CPU from ``generator``, in the dtype of the flow: a seed gives the same noise at every temperature and on
        every device.
        """
        dtype = torch.promote_types(self._like.dtype, torch.float32)
        return self.from_noise([noise.draw(n, generator, dtype) for noise in self.noise], temperature, context)


class Standard(Distribution):
    """Independent, identically distributed coordinates around 0, without parameters."""

    reparameterized = True
    kind: str  # of noise

    def log_prob(self, z, context=None):
        return self.log_density(z).flatten(1).sum(1)

    @property
    def noise(self):
        return (Noise(self.kind, self.shape),)

    def from_noise(self, noise, temperature=1.0, context=None):
        (z,) = noise
        return temperature * z


class StandardNormal(Standard):
    """N(0, I).

    >>> StandardNormal((2,)).log_prob(torch.zeros(1, 2))
    tensor([-1.8379])
    """

    kind = "normal"

    def log_prob(self, z, context=None):
        # one reduction over the squares; the constant is added once
        return -0.5 * (z.square().flatten(1).sum(1) + prod(self.shape) * math.log(2 * math.pi))

    def log_density(self, z, context=None):
        return -0.5 * (z.square() + math.log(2 * math.pi))


class Logistic(Standard):
    """The logistic distribution with location 0 and scale 1: NICE's prior (Dinh et al. 2015, section 3.4).

    >>> Logistic((2,)).log_prob(torch.zeros(1, 2))
    tensor([-2.7726])
    """

    kind = "logistic"

    def log_density(self, z, context=None):
        return -F.softplus(z) - F.softplus(-z)


class ConditionalNormal(Distribution):
    """N(μ(c), diag σ(c)²), with μ and log σ affine functions of the context vector c, 0 at the start.

    With one-hot labels as context it has a mean and a diagonal covariance for each class.

    Raises:
        ValueError: ``context_shape`` is not that of a vector; in ``log_prob`` and ``sample``, no context.

    >>> ConditionalNormal((2,), context_shape=(3,)).sample(5, context=torch.eye(3)[[0, 1, 2, 0, 1]]).shape
    torch.Size([5, 2])
    """

    reparameterized = True

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
        return self.log_density(z, context).flatten(1).sum(1)

    def log_density(self, z, context=None):
        return _normal_log_density(z, *self.moments(context))

    @property
    def noise(self):
        return (Noise("normal", self.shape),)

    def from_noise(self, noise, temperature=1.0, context=None):
        (z,), (mean, log_scale) = noise, self.moments(context)
        if mean.shape[0] != z.shape[0]:
            raise ValueError(f"{len(z)} draws need a context of {len(z)} rows, not {len(mean)}")
        return mean + temperature * log_scale.exp() * z.to(mean)


class _Mixture(Distribution):
    """Weights and means of the components of a mixture."""

    def __init__(self, shape, components: int, spread: float):
        super().__init__(shape)
        if components < 1:
            raise ValueError(f"components={components} must be at least 1")
        if not 0 <= spread < 1:
            raise ValueError(f"spread={spread} must lie in [0, 1)")
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(spread * torch.randn(components, *self.shape))

    @property
    def noise(self):
        return Noise("uniform", ()), Noise("normal", self.shape)


class Mixture(_Mixture):
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
        super().__init__(shape, components, spread)
        self.log_scale = nn.Parameter(torch.full((components, *self.shape), 0.5 * math.log1p(-(spread**2))))

    def log_prob(self, z, context=None):
        each = _normal_log_density(z[:, None], self.mean, self.log_scale).flatten(2).sum(2)
        return torch.logsumexp(each + self.logits.log_softmax(0), 1)

    def from_noise(self, noise, temperature=1.0, context=None):
        u, z = (one.to(self.mean) for one in noise)
        index = _component(self.logits, u)
        return self.mean[index] + temperature * self.log_scale[index].exp() * z


_MOST = 2**24  # numbers that a mixture of vectors holds at once


class NormalMixture(_Mixture):
    """Σₖ wₖ N(μₖ, Σₖ) of vectors, with learned weights, means and covariances Σₖ = (Pₖ Pₖᵀ)⁻¹.

    With ``shared``, all components have one P: with a mean at each row of data, a kernel density estimate. At the start
    the means are drawn from N(0, spread²) and every covariance is (1 − spread²)·I, as in :class:`Mixture`. Temperature
    scales a sample's distance from the mean of its component.

    Args:
        shape: of one event, (D,).
        components: K, the number of normals.
        shared: whether all have the same covariance.
        spread: standard deviation of the means at the start.
        context_shape: not used.

    Raises:
        ValueError: ``shape`` is not that of a vector, ``components`` below 1, or ``spread`` outside [0, 1).

    >>> NormalMixture((2,), components=3).sample(5).shape
    torch.Size([5, 2])
    """

    def __init__(self, shape, components: int = 10, shared: bool = False, spread: float = 0.8, context_shape=None):
        super().__init__(shape, components, spread)
        if len(self.shape) != 1:
            raise ValueError(f"a mixture with covariances takes vectors, not shape {list(self.shape)}")
        start = torch.eye(self.shape[0]) / math.sqrt(1 - spread**2)
        self.factor = nn.Parameter(start.repeat(1 if shared else components, 1, 1))

    def log_prob(self, z, context=None):
        rows = max(1, _MOST // (len(self.mean) * (1 if len(self.factor) == 1 else self.shape[0])))
        return torch.cat([self._log_prob(part) for part in z.split(rows)])

    def _log_prob(self, z: Tensor) -> Tensor:
        if len(self.factor) == 1:
            exact = "donot_use_mm_for_euclid_dist"
            squares = torch.cdist(z @ self.factor[0], self.mean @ self.factor[0], compute_mode=exact).square()
        else:
            squares = torch.einsum("bkd,kde->bke", z[:, None] - self.mean, self.factor).square().sum(2)
        log_det = self.factor.slogdet()[1]
        each = -0.5 * squares + log_det - 0.5 * self.shape[0] * math.log(2 * math.pi)
        return torch.logsumexp(each + self.logits.log_softmax(0), 1)

    def from_noise(self, noise, temperature=1.0, context=None):
        u, z = (one.to(self.mean) for one in noise)
        index = _component(self.logits, u)
        factor = self.factor[index if len(self.factor) > 1 else index * 0]
        return self.mean[index] + temperature * torch.linalg.solve(factor.mT, z[..., None])[..., 0]


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
        self.reparameterized = all(part.reparameterized for part in parts)

    def log_prob(self, z, context=None):
        return sum(part.log_prob(piece, context) for part, piece in zip(self.parts, z.split(self.sizes, 1)))

    def log_density(self, z, context=None):
        pieces = zip(self.parts, z.split(self.sizes, 1))
        return torch.cat([part.log_density(piece, context).flatten(1) for part, piece in pieces], 1)

    @property
    def noise(self):
        return tuple(noise for part in self.parts for noise in part.noise)

    def from_noise(self, noise, temperature=1.0, context=None):
        left = iter(noise)
        drawn = [part.from_noise([next(left) for _ in part.noise], temperature, context) for part in self.parts]
        return torch.cat([part.to(drawn[0]) for part in drawn], 1)


def _component(logits: Tensor, u: Tensor) -> Tensor:
    """The component of a mixture that each of the uniform numbers ``u`` (n,) chooses: (n,)."""
    ends = logits.double().softmax(0).cumsum(0)[:-1]  # of each component's share of [0, 1]
    return torch.searchsorted(ends, u.double(), right=True)


def _normal_log_density(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-density of each coordinate of N(mean, exp(log_scale)²); the arguments broadcast."""
    return -0.5 * ((z - mean) * torch.exp(-log_scale)).square() - log_scale - 0.5 * math.log(2 * math.pi)
