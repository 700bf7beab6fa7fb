"""Distribution functions of histograms with equal bins on [0, 1], as univariate maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.bijections.univariate import Univariate


class Histogram(Univariate):
    """The cumulative distribution of a histogram of ``bins`` equal bins on [0, 1]; the identity outside.

    A subclass says what probabilities θ gives the bins.

    Args:
        shape: of the elements.
        bins: number of bins.
        floor: the smallest probability of a bin, which bounds the slope of the inverse.

    Raises:
        ValueError: ``bins`` below 2, or ``floor`` outside (0, 1/bins).
    """

    def __init__(self, shape, bins: int, floor: float):
        super().__init__(shape)
        if bins < 2:
            raise ValueError(f"bins={bins} must be at least 2")
        if not 0 < floor < 1 / bins:
            raise ValueError(f"floor={floor} must lie between 0 and 1/bins")
        self.bins, self.floor = bins, floor

    def at(self, index: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The probability below each bin of ``index``, whole numbers as floats, and that of the bin."""
        raise NotImplementedError

    def find(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The index of the bin in which the distribution function reaches y, and what :meth:`at` returns of it."""
        raise NotImplementedError

    def forward(self, x, theta):
        index = (x * self.bins).floor().clamp(0, self.bins - 1)
        before, own = self.at(index, theta)
        y = (before + own * (x * self.bins - index)).clamp(0, 1)  # not beyond by a rounding
        inside = (x >= 0) & (x <= 1)
        return torch.where(inside, y, x), torch.where(inside, (own * self.bins).log(), 0.0)

    def inverse(self, y, theta):
        index, before, own = self.find(y, theta)
        x = (index + ((y - before) / own).clamp(0, 1)) / self.bins
        inside = (y >= 0) & (y <= 1)
        return torch.where(inside, x, y), torch.where(inside, -(own * self.bins).log(), 0.0)


class PiecewiseLinear(Histogram):
    """A :class:`Histogram` with a parameter for each bin.

    θ holds the bins' logits (Müller et al. 2019, section 4.1). With as many bins as integer data have values it gives
    each value its own probability.

    Args:
        shape: of the elements.
        bins: number of bins, and of parameters per element.
        floor: the smallest probability of a bin.

    Raises:
        ValueError: ``bins`` below 2, or ``floor`` outside (0, 1/bins).

    >>> PiecewiseLinear((3,))(torch.full((1, 3), 0.5), torch.zeros(1, 3, 8))[0]
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, shape, bins: int = 8, floor: float = 1e-5):
        super().__init__(shape, bins, floor)
        self.params = bins

    def at(self, index, theta):
        return self._at(index.long().clamp(0, self.bins - 1), self._weight(theta))  # NaN has an index too

    def find(self, y, theta):
        weight = self._weight(theta)
        index = (y[..., None] >= weight.cumsum(-1)[..., :-1]).sum(-1)
        return index, *self._at(index, weight)

    def _weight(self, theta):
        """The probability of each bin."""
        return self.floor + (1 - self.bins * self.floor) * torch.softmax(theta, -1)

    @staticmethod
    def _at(index, weight):
        index = index[..., None]
        weight = weight.expand(*index.shape[:-1], -1)
        own = weight.gather(-1, index)[..., 0]
        return weight.cumsum(-1).gather(-1, index)[..., 0] - own, own


class DiscretizedLogistic(Histogram):
    """A :class:`Histogram` whose probabilities are those of a mixture of logistic distributions, with what lies outside
    of [0, 1] in the first and the last bin (Salimans et al. 2017, section 2.1).

    θ holds a shift of all components, and their logits, means and log-scales. A pass computes two values of the
    mixture's distribution function, its inverse those at all edges. With θ = 0 the means spread over [0, 1].

    Args:
        shape: of the elements.
        bins: number of bins.
        components: of the mixture; 3·components + 1 parameters per element, and one for each atom.
        floor: the smallest probability of a bin, which bounds the slope of the inverse.
        atoms: bins that get a probability besides the mixture's, each with a logit of its own.

    Raises:
        ValueError: ``bins`` below 2, ``components`` below 1, ``floor`` outside (0, 1/bins), or an atom that is no bin.

    >>> DiscretizedLogistic((3,), bins=8)(torch.full((1, 3), 0.5), torch.zeros(1, 3, 31))[0]
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    means: torch.Tensor
    atoms: torch.Tensor
    narrowest = -8.0  # log-scale

    def __init__(self, shape, bins: int, components: int = 10, floor: float = 1e-6, atoms: Sequence[int] = ()):
        super().__init__(shape, bins, floor)
        if components < 1:
            raise ValueError(f"components={components} must be at least 1")
        if not {*atoms} <= {*range(bins)}:
            raise ValueError(f"atoms={list(atoms)} must lie between 0 and {bins - 1}")
        self.components = components
        self.params = 1 + len(atoms) + 3 * components
        self.register_buffer("means", (torch.arange(components) + 0.5) / components, persistent=False)
        self.register_buffer("atoms", torch.tensor(atoms, dtype=torch.float32), persistent=False)

    def at(self, index, theta):
        before, after = self._below(torch.stack((index, index + 1), -1), theta).unbind(-1)
        return before, after - before

    def find(self, y, theta):
        edges = torch.arange(self.bins + 1, dtype=y.dtype, device=y.device).expand(*y.shape, -1)
        below = self._below(edges, theta)
        index = (y[..., None] >= below[..., 1:-1]).sum(-1, keepdim=True)
        before, after = below.gather(-1, index)[..., 0], below.gather(-1, index + 1)[..., 0]
        return index[..., 0], before, after - before

    def _below(self, edge, theta):
        """The probability below each edge, (…, n), counted from 0 to ``bins``."""
        sizes = [1, len(self.atoms) + self.components, self.components, self.components]
        shift, logits, mean, log_scale = theta[..., None, :].split(sizes, -1)
        atom, weight = logits.softmax(-1).split([len(self.atoms), self.components], -1)
        slope = 2 * self.components * (-log_scale).clamp(max=-self.narrowest).exp()
        mean = self.means.to(mean.dtype) + shift + mean / (2 * self.components)  # in units of the scale at the start
        edge = edge[..., None]
        each = torch.sigmoid((edge / self.bins - mean) * slope)
        each = torch.where(edge <= 0, 0.0, torch.where(edge >= self.bins, 1.0, each))
        below = (weight * each).sum(-1) + (atom * (edge > self.atoms.to(edge.dtype))).sum(-1)
        edge = edge[..., 0]
        return self.floor * edge + (1 - self.bins * self.floor) * below
