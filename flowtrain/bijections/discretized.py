"""Mixtures of logistic distributions whose density is the same throughout each of equal bins."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowtrain.bijections.univariate import Univariate


class DiscretizedLogistic(Univariate):
    """The cumulative distribution of a histogram of ``bins`` equal bins on [0, 1], whose probabilities are those of a
    mixture of logistic distributions, with what lies outside of [0, 1] in the first and the last bin (Salimans et al.
    2017, section 2.1); the identity outside.

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
        super().__init__(shape)
        if bins < 2:
            raise ValueError(f"bins={bins} must be at least 2")
        if components < 1:
            raise ValueError(f"components={components} must be at least 1")
        if not 0 < floor < 1 / bins:
            raise ValueError(f"floor={floor} must lie between 0 and 1/bins")
        if not {*atoms} <= {*range(bins)}:
            raise ValueError(f"atoms={list(atoms)} must lie between 0 and {bins - 1}")
        self.bins, self.components, self.floor = bins, components, floor
        self.params = 1 + len(atoms) + 3 * components
        self.register_buffer("means", (torch.arange(components) + 0.5) / components, persistent=False)
        self.register_buffer("atoms", torch.tensor(atoms, dtype=torch.float32), persistent=False)

    def forward(self, x, theta):
        index = (x * self.bins).floor().clamp(0, self.bins - 1)
        before, after = self._below(torch.stack((index, index + 1), -1), theta).unbind(-1)
        own = after - before
        y = (before + own * (x * self.bins - index)).clamp(0, 1)  # not beyond by a rounding
        inside = (x >= 0) & (x <= 1)
        return torch.where(inside, y, x), torch.where(inside, (own * self.bins).log(), 0.0)

    def inverse(self, y, theta):
        edges = torch.arange(self.bins + 1, dtype=y.dtype, device=y.device).expand(*y.shape, -1)
        below = self._below(edges, theta)
        index = (y[..., None] >= below[..., 1:-1]).sum(-1, keepdim=True)
        before, after = below.gather(-1, index)[..., 0], below.gather(-1, index + 1)[..., 0]
        own = after - before
        x = (index[..., 0] + ((y - before) / own).clamp(0, 1)) / self.bins
        inside = (y >= 0) & (y <= 1)
        return torch.where(inside, x, y), torch.where(inside, -(own * self.bins).log(), 0.0)

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
