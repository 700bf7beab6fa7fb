"""Monotone splines as univariate maps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.bijections.native import rational_quadratic as native
from flowtrain.bijections.native.coupling import Plan, coupling
from flowtrain.bijections.univariate import ExpAffine, Univariate, soft_clip


class RationalQuadratic(Univariate):
    """A monotone rational-quadratic spline on [−bound, bound]; the identity outside (Durkan et al. 2019, section 3.1).

    θ holds the logits of ``bins`` widths and of as many heights, and a number for the slope at each of the bins − 1
    inner knots; at both ends the slope is 1. With θ = 0 it is the identity.

    Args:
        shape: of the elements.
        bins: number of bins; 3·bins − 1 parameters per element.
        bound: half the length of the interval.
        min_width, min_height: smallest width and height of a bin, as a share of the interval.
        min_derivative: smallest slope at a knot.

    Raises:
        ValueError: a value outside its range.

    >>> RationalQuadratic((3,))(torch.full((1, 3), 0.5), torch.zeros(1, 3, 23))[0]
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    max_derivative = 1e4  # far above what data ask for: unbounded, one odd θ overflows

    def __init__(
        self,
        shape,
        bins: int = 8,
        bound: float = 3.0,
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_derivative: float = 1e-3,
    ):
        super().__init__(shape)
        if bins < 2:
            raise ValueError(f"bins={bins} must be at least 2")
        if not bound > 0:
            raise ValueError(f"bound={bound} must be positive")
        for name, least in {"min_width": min_width, "min_height": min_height}.items():
            if not 0 < least < 1 / bins:
                raise ValueError(f"{name}={least} must lie between 0 and 1/bins")
        if not 0 < min_derivative < 1:
            raise ValueError(f"min_derivative={min_derivative} must lie between 0 and 1")
        self.params, self.bins, self.bound = 3 * bins - 1, bins, bound
        self.least = [2 * bound * least for least in (min_width, min_height)]
        self.share = [2 * bound - bins * least for least in self.least]  # what the softmax shares out
        self.min_derivative = min_derivative
        self.shift = math.log(math.expm1(1 - min_derivative))  # its softplus makes a slope of 1

    def forward(self, x, theta):
        return self._by_native(x, theta, False, self._forward) or self._forward(x, theta)

    def inverse(self, y, theta):
        return self._by_native(y, theta, True, self._inverse) or self._inverse(y, theta)

    def joins(self, other):
        settings = self._settings()
        return settings is not None and type(self) is type(other) and settings == other._settings()

    def of_parts(self, x, theta, shared, places, in_turn):
        return native.spline_of_parts(x, theta, shared, places, self._settings(), in_turn)

    def of_network(self, x, shared, places, seen, layers, in_turn):
        kinds, tensors = layers
        return coupling(x, shared, Plan(seen, kinds, places, self._settings()), tensors, in_turn)

    def _by_native(self, values, theta, inverse, by_torch):
        """The map by a C++ function; None where that does not apply."""
        settings = self._settings()
        return settings and native.spline(values, theta, settings, inverse, by_torch)

    def _settings(self) -> tuple[float, ...] | None:
        """For C++; None for a subclass, which has a map of its own."""
        if type(self) is not RationalQuadratic:
            return None
        ends = self.shift, self.min_derivative, self.max_derivative
        return float(self.bins), float(self.bound), *self.least, *self.share, *ends, 0.0

    def _forward(self, x, theta):
        inside = x.clamp(-self.bound, self.bound)
        piece = self._find(inside, theta, axis=0)
        rise, log_slope = piece.at(((inside - piece.left) / piece.width).clamp(0, 1))
        is_inside = x == inside
        return torch.where(is_inside, piece.bottom + piece.height * rise, x), torch.where(is_inside, log_slope, 0.0)

    def _inverse(self, y, theta):
        inside = y.clamp(-self.bound, self.bound)
        piece = self._find(inside, theta, axis=1)
        t = piece.position(((inside - piece.bottom) / piece.height).clamp(0, 1))
        is_inside = y == inside
        return torch.where(is_inside, piece.left + piece.width * t, y), torch.where(is_inside, -piece.at(t)[1], 0.0)

    def _find(self, value: Tensor, theta: Tensor, axis: int) -> Bin:
        """The bin whose side on ``axis`` (0: x, 1: y) holds ``value``, in [−bound, bound].

        Passes over all bins are the cost. They are cheap where bins come first, so that each is a row, and where masks
        of 0 and 1 pick a bin: an index, or a mask of booleans, keeps compiled code from working on vectors.
        """
        theta = theta.movedim(-1, 0)
        if theta.dim() == value.dim():  # all examples share it
            theta = theta[:, None]
        sizes, slopes = theta.contiguous().split([2 * self.bins, len(theta) - 2 * self.bins])
        shares = self._logits(sizes).unflatten(0, (2, self.bins)).softmax(1)
        with torch.no_grad():
            end, reached = -self.bound, [torch.ones_like(value)]
            for share in shares[axis, :-1]:
                end = end + (self.share[axis] * share + self.least[axis])
                reached.append((value >= end).to(value.dtype))
            starts = torch.stack([*reached, torch.zeros_like(value)])
            here, passed = starts[:-1] - starts[1:], starts[1:-1]
            index = passed.sum(0)
        own, before = (shares * here).sum(1), (shares[:, :-1] * passed).sum(1)
        start, size = [], []
        for share, least, passed, inside in zip(self.share, self.least, before, own):
            start.append(share * passed + (least * index - self.bound))
            size.append(share * inside + least)
        return Bin(*start, *size, *self._slope(torch.stack(self._at_both_ends(slopes, here))))

    def _logits(self, numbers: Tensor) -> Tensor:
        """The logits of widths and heights."""
        return numbers

    def _slope(self, numbers: Tensor) -> Tensor:
        """The slopes at knots, 1 for 0."""
        return (F.softplus(numbers + self.shift) + self.min_derivative).clamp(max=self.max_derivative)

    def _at_both_ends(self, slopes: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of ``slopes`` at the two knots of the bin that the mask ``here`` picks."""
        # before the first and after the last inner knot the sum is 0, whose slope is 1
        return (slopes * here[1:]).sum(0), (slopes * here[:-1]).sum(0)


class AffineRationalQuadratic(Univariate):
    """y = spline((x + t)·exp(s)): a :class:`RationalQuadratic` spline whose place and scale are parameters too, where
    that alone is the identity outside [−bound, bound].

    θ holds the spline's parameters, then t and s. With θ = 0 it is the identity.

    Args:
        shape: of the elements.
        bins, bound, min_width, min_height, min_derivative: as in :class:`RationalQuadratic`.
        scale_bound: s is clamped to ±scale_bound, as in :class:`ExpAffine`.

    Raises:
        ValueError: a value outside its range.

    >>> AffineRationalQuadratic((3,))(torch.full((1, 3), 0.5), torch.zeros(1, 3, 25))[0]
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    def __init__(
        self,
        shape,
        bins: int = 8,
        bound: float = 3.0,
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_derivative: float = 1e-3,
        scale_bound: float = 10.0,
    ):
        super().__init__(shape)
        self.spline = RationalQuadratic(shape, bins, bound, min_width, min_height, min_derivative)
        self.affine = ExpAffine(shape, scale_bound)
        self.params = self.spline.params + self.affine.params

    def forward(self, x, theta):
        inner, log_scale = self.affine(x, theta[..., -2:])
        y, log_slope = self.spline(inner, theta[..., :-2])
        return y, log_scale + log_slope

    def inverse(self, y, theta):
        inner, log_slope = self.spline.inverse(y, theta[..., :-2])
        x, log_scale = self.affine.inverse(inner, theta[..., -2:])
        return x, log_scale + log_slope


class SoftClippedRationalQuadratic(RationalQuadratic):
    """A :class:`RationalQuadratic` spline as zuko has it: the logits of widths and heights, and the logarithms of
    slopes, are clipped softly, so that widths and heights have no least size.

    Args:
        shape: of the elements.
        bins: number of bins; 3·bins − 1 parameters per element.
        bound: half the length of the interval.
        least: the smallest slope, and its inverse the largest.

    Raises:
        ValueError: a value outside its range.

    >>> SoftClippedRationalQuadratic((3,))(torch.full((1, 3), 0.5), torch.zeros(1, 3, 23))[0]
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, shape, bins: int = 8, bound: float = 5.0, least: float = 1e-3):
        super().__init__(shape, bins, bound)
        if not 0 < least < 1:
            raise ValueError(f"least={least} must lie between 0 and 1")
        self.clip, self.least, self.share = least, [0.0, 0.0], [2 * bound, 2 * bound]

    def _settings(self):
        if type(self) is not SoftClippedRationalQuadratic:
            return None
        ends = 0.0, 0.0, 1 / self.clip
        return float(self.bins), float(self.bound), *self.least, *map(float, self.share), *ends, -math.log(self.clip)

    def _logits(self, numbers):
        return soft_clip(2 * numbers, self.clip) / 2

    def _slope(self, numbers):
        return soft_clip(numbers, self.clip).exp()


class CircularRationalQuadratic(RationalQuadratic):
    """A monotone rational-quadratic spline of the circle, and a rotation: a circular spline (Rezende et al. 2020,
    section 2.1.2).

    The circle is the real numbers modulo 1, so that x and x + 1 are one point: y(x + 1) = y(x) + 1. From −½ to ½, y − t
    is a spline of :class:`RationalQuadratic`, with the same slope at both ends, and t a parameter. With θ = 0 it is the
    identity.

    Args:
        shape: of the elements.
        bins: number of bins; 3·bins + 1 parameters per element: ``bins`` widths, heights and slopes, and t.
        min_width, min_height, min_derivative: as in :class:`RationalQuadratic`.

    Raises:
        ValueError: a value outside its range.

    >>> CircularRationalQuadratic((3,))(torch.full((1, 3), 5.25), torch.zeros(1, 3, 25))[0]
    tensor([[5.2500, 5.2500, 5.2500]])
    """

    def __init__(self, shape, bins: int = 8, min_width=1e-3, min_height=1e-3, min_derivative=1e-3):
        super().__init__(shape, bins, 0.5, min_width, min_height, min_derivative)
        self.params = 3 * bins + 1

    def forward(self, x, theta):
        turns = x.round()
        y, log_slope = super().forward(x - turns, theta[..., :-1])
        return y + turns + theta[..., -1], log_slope

    def inverse(self, y, theta):
        y = y - theta[..., -1]
        turns = y.round()
        x, log_slope = super().inverse(y - turns, theta[..., :-1])
        return x + turns, log_slope

    def _at_both_ends(self, slopes, here):
        return (slopes * here).sum(0), (slopes.roll(-1, 0) * here).sum(0)


class Bin(NamedTuple):
    """A piece of the spline: its lower left corner, width, height, and slopes dy/dx at both ends.

    t and the rise go from 0 to 1 across the bin.
    """

    left: Tensor
    bottom: Tensor
    width: Tensor
    height: Tensor
    slope0: Tensor
    slope1: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The rise and the logarithm of dy/dx at t: Durkan et al. 2019, eq. 4 and 5, as sums of positive numbers."""
        mean, u = self.height / self.width, 1 - t
        first, second = mean * t + self.slope0 * u, mean * u + self.slope1 * t
        done = t * first
        whole = done + u * second
        return done / whole, ((mean / whole).square() * (u * first + t * second)).log()

    def position(self, rise: Tensor) -> Tensor:
        """The t of a rise: the root of eq. 6–8, in a form without cancellation.

        The discriminant b² − 4ac is (slope0·(1 − rise) − slope1·rise)² + 4·mean²·rise·(1 − rise) times height², which
        rounding cannot make negative, and t : (1 − t) is a ratio of positive numbers.
        """
        mean = self.height / self.width
        tilt = self.slope0 * (1 - rise) - self.slope1 * rise
        root = (tilt * tilt + 4 * mean * mean * rise * (1 - rise)).sqrt()
        leans_left = tilt >= 0
        size = root + torch.where(leans_left, tilt, -tilt)
        done = torch.where(leans_left, 2 * mean * rise, size)
        rest = torch.where(leans_left, size, 2 * mean * (1 - rise))
        return done / (done + rest)
