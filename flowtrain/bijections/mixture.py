"""Cumulative distribution functions of mixtures as univariate maps, followed by the logit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.bijections.univariate import Univariate
from flowtrain.runtime import modes


class _Components(NamedTuple):
    """Each (…, components)."""

    log_weight: Tensor
    mean: Tensor
    log_scale: Tensor


class _Mixture(Univariate):
    """y = logit F(x), with F the distribution function of a mixture; subclasses define its components.

    θ holds the components' logits, means and log-scales. log F and log(1 − F) are each a log-sum-exp, so that y stays
    accurate where F rounds to 0 or 1. With θ = 0 the means spread over [−1, 1] (equal components would have equal
    gradients and stay equal), and the common scale gives F the variance of the standard logistic distribution, whose
    logit is the identity. Log-scales stay within ``bound`` of that one.
    """

    smooth = True
    iterative = True
    variance: float  # of a component of scale 1
    bisections, newton_steps = 24, 8  # enough for float64, and for extreme weights, means and scales
    means: Tensor

    def __init__(self, shape, components: int, bound: float = 7.0):
        super().__init__(shape)
        if components < 1:
            raise ValueError(f"components={components} must be at least 1")
        if not bound > 0:
            raise ValueError(f"bound={bound} must be positive")
        self.components, self.bound = components, bound
        self.params = 3 * components
        means = [2 * i / (components - 1) - 1 for i in range(components)] if components > 1 else [0.0]
        self.register_buffer("means", torch.tensor(means), persistent=False)
        rest = math.pi**2 / 3 - sum(mean * mean for mean in means) / components
        self.log_scale = 0.5 * math.log(rest / self.variance)

    def log_tails(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log P(Z ≤ z) and log P(Z > z) for a component Z of mean 0 and scale 1."""
        raise NotImplementedError

    def log_density(self, z: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """log p(z); ``below`` and ``above`` are the log tails at z."""
        raise NotImplementedError

    def quantile(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The z at which the logit of Z's distribution function is y: a lower and an upper bound."""
        raise NotImplementedError

    def forward(self, x, theta):
        return self._map(x, self._components(theta))

    def inverse(self, y, theta):
        components = self._components(theta)
        with torch.no_grad():
            root = self._root(y, components)
        # one more Newton step of length 0: its gradient is that of the implicit function
        value, log_derivative = self._map(root, components)
        step = (y - value) * _inverse_slope(log_derivative.detach())
        x = root + (step - step.detach())
        return x, -self._map(x, components)[1]

    def _components(self, theta: Tensor) -> _Components:
        logits, mean, raw = theta.split(self.components, -1)
        log_scale = self.bound * torch.tanh(raw / self.bound) + self.log_scale
        return _Components(logits.log_softmax(-1), mean + self.means.to(mean.dtype), log_scale)

    def _map(self, x: Tensor, components: _Components) -> tuple[Tensor, Tensor]:
        z, tails = self._tails(x, components)
        below, above = self._mix(tails, components)
        density = (components.log_weight + self.log_density(z, *tails) - components.log_scale).logsumexp(-1)
        return below - above, density - below - above

    def _tails(self, x: Tensor, components: _Components) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        z = (x[..., None] - components.mean) * (-components.log_scale).exp()
        return z, self.log_tails(z)

    @staticmethod
    def _mix(tails, components: _Components) -> list[Tensor]:
        """The log tails of the mixture from those of its components."""
        return [(components.log_weight + tail).logsumexp(-1) for tail in tails]

    def _root(self, y: Tensor, components: _Components) -> Tensor:
        """x by a fixed number of bisections, then of Newton steps that stay inside the bracket.

        The bracket: at the greatest of the components' quantiles every component, and so the mixture, has at least the
        wanted probability; at the least of them it has at most that.
        """
        scale = components.log_scale.exp()
        low, high = self.quantile(y)
        low = (components.mean + scale * low[..., None]).amin(-1)
        high = (components.mean + scale * high[..., None]).amax(-1)
        state, count = (low, high, (low + high) / 2), self.bisections + self.newton_steps
        if modes.current().tracing:  # a loop in the program too
            from torch._higher_order_ops.while_loop import while_loop_op  # takes a while

            start: tuple = torch.zeros((), dtype=torch.int64), *state
            return while_loop_op(lambda i, *_: i < count, self._next, start, (y, *components))[-1]
        for i in range(count):
            _, *state = self._next(i, *state, y, *components)
        return state[-1]

    def _next(self, i, low, high, x, y, *components):
        """i + 1 and the next bracket and x: the bracket's middle, or a Newton step after enough bisections."""
        value, log_derivative = self._map(x, _Components(*components))
        low, high = torch.where(value < y, x, low), torch.where(value < y, high, x)
        newton, middle = x + (y - value) * _inverse_slope(log_derivative), (low + high) / 2
        is_newton = (newton >= low) & (newton <= high) & (i + 1 > self.bisections)
        return i + 1, low, high, torch.where(is_newton, newton, middle)


def _inverse_slope(log_derivative: Tensor) -> Tensor:
    """dx/dy, finite also where F is flat."""
    return (-log_derivative).clamp(max=60).exp()


class MixtureLogistic(_Mixture):
    """y = exp(s)·logit F(x) + t, F a mixture of logistic distributions: Flow++'s map (Ho et al. 2019, section 3.2).

    With θ = 0 and 8 components |y − x| < 0.04 for |x| < 3.

    Args:
        shape: of the elements.
        components: of the mixture; 3·components + 2 parameters per element.
        bound: of |s|, and of how far log-scales move from their start.

    Raises:
        ValueError: ``components`` below 1, or ``bound`` not above 0.

    >>> MixtureLogistic((2,))(torch.zeros(1, 2), torch.zeros(1, 2, 26))[0].shape
    torch.Size([1, 2])
    """

    variance = math.pi**2 / 3

    def __init__(self, shape, components: int = 8, bound: float = 7.0):
        super().__init__(shape, components, bound)
        self.params = 3 * components + 2

    def forward(self, x, theta):
        theta, s, t = self._split(theta)
        y, log_derivative = super().forward(x, theta)
        return y * s.exp() + t, log_derivative + s

    def inverse(self, y, theta):
        theta, s, t = self._split(theta)
        x, log_derivative = super().inverse((y - t) * (-s).exp(), theta)
        return x, log_derivative - s

    def _split(self, theta):
        mixture, s, t = theta.split([3 * self.components, 1, 1], -1)
        return mixture, self.bound * torch.tanh(s[..., 0] / self.bound), t[..., 0]

    def log_tails(self, z):
        return F.logsigmoid(z), F.logsigmoid(-z)

    def log_density(self, z, below, above):
        return below + above

    def quantile(self, y):
        return y, y


class MixtureNormal(_Mixture):
    """y = logit F(x), F a mixture of normal distributions.

    With a standard logistic base distribution, whose distribution function is the inverse of the logit, log p(x) is the
    log-density of the mixture. So an autoregressive layer of this map is MADE with mixture-of-Gaussians conditionals
    (Papamakarios et al. 2017, section 4). With θ = 0 and 10 components |y − x| < 0.15 for |x| < 3.

    Args:
        shape: of the elements.
        components: of the mixture; 3·components parameters per element.
        bound: of how far log-scales move from their start.

    Raises:
        ValueError: ``components`` below 1, or ``bound`` not above 0.

    >>> MixtureNormal((2,))(torch.zeros(1, 2), torch.zeros(1, 2, 30))[0].shape
    torch.Size([1, 2])
    """

    variance = 1.0

    def __init__(self, shape, components: int = 10, bound: float = 7.0):
        super().__init__(shape, components, bound)

    def log_tails(self, z):
        # torch.special.log_ndtr has these values, but in float32 its gradient is 8 % off at z = −1,000
        negative = z < 0
        t = torch.where(negative, -z, z) / math.sqrt(2)
        tail = torch.special.erfc(t) / 2
        near = t < 1
        smaller = torch.where(near, torch.where(near, tail, 1).log(), (torch.special.erfcx(t) / 2).log() - z * z / 2)
        larger = torch.log1p(-tail)
        return torch.where(negative, smaller, larger), torch.where(negative, larger, smaller)

    def log_density(self, z, below, above):
        return -z * z / 2 - math.log(2 * math.pi) / 2

    def quantile(self, y):
        # The hazard h of a normal tail lies between t and t + √(2/π), since h(t) − t decreases from √(2/π) to 0. So
        # t²/2 lies between L − t·√(2/π) and L, where L = −log P(Z > t) − log 2 is the integral of h.
        hazard = math.sqrt(2 / math.pi)
        twice = 2 * (F.softplus(y.abs()) - math.log(2)).clamp(min=0)
        far = twice.sqrt()
        near = twice / ((twice + hazard * hazard).sqrt() + hazard)
        return torch.where(y < 0, -far, near), torch.where(y < 0, -near, far)
