"""First layers of flows of bounded data: no sample leaves the support."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, full_precision, is_sequence, size, sum_event
from flowtrain.bijections.interval import from_line, to_line

Bound = float | None | Sequence["Bound"]


class Support(Bijection):
    """From a subset of ℝᴰ to all real numbers: the first layer of a flow.

    ``inverse`` returns points inside whatever it is given and however they round. In ``forward`` a point outside, which
    has no density, becomes NaN.
    """

    def contains(self, x: Tensor) -> Tensor:
        """Whether each of x (B, *shape) is inside: (B,)."""
        return ~self(x)[0].flatten(1).isnan().any(1)

    def explain(self, x: Tensor) -> str | None:
        """Why the event x is outside; None for one inside."""
        raise NotImplementedError

    @property
    def constraint(self) -> constraints.Constraint:
        """The support, for distributions of torch."""
        raise NotImplementedError

    def free(self, x: Tensor) -> Tensor:
        """The coordinates of points (B, *shape) with respect to which their density is one: a linear map."""
        return x

    def lift(self, free: Tensor) -> Tensor:
        """The points with these coordinates: an affine map."""
        return free

    def mend(self, x: Tensor) -> Tensor:
        """Points next to these at which a Jacobian in float64 has digits enough."""
        return x

    def fit(self, columns, rows: Tensor) -> None:
        """Refuse rows of a train split (n, *shape) that are not all inside; ``columns``: of a table, or None.

        Raises:
            ValueError: one is not, or the columns of the table are stored minus an offset.
        """
        for column in columns.encoded if columns is not None else ():
            if column.offset:
                raise ValueError(
                    f"column '{column.name}' is far from 0 for its spread; give its bounds as "
                    f"dataset.types={{{column.name}: [low, high]}}"
                )
        outside = ~self.contains(rows)
        if outside.any():
            first = int(outside.nonzero()[0])
            raise ValueError(
                f"{int(outside.sum()):,} of {len(rows):,} training examples are outside; of the first,"
                f" {self.explain(rows[first])}"
            )


class Box(Support):
    """Numbers between bounds to all real numbers. With t = (x − low)/(high − low), z = 3.25·(t − ½) for 0.1 ≤ t ≤ 0.9,
    z = 3.25·(0.1·log(10·t) − 0.4) below, which has the same slope at 0.1, and likewise above: so z has mean 0 and
    deviation 1 where x is uniform. See :func:`flowtrain.bijections.interval.to_line`.

    With one bound z = log(x − low) or z = −log(high − x); without any, z = x. A value on one of two bounds, which would
    map to ±∞, counts as half a rounding of the width inside. A value on an only bound is outside.

    Args:
        shape: of one event.
        low, high: a number for all of the event, or nested lists of its shape; None: no bound.

    Raises:
        ValueError: a bound is not a number, there are not as many as numbers in an event, or ``low`` is not below
            ``high`` by more than float32 resolves.

    >>> layer = Box((3,), low=0, high=[1, 10, None])
    >>> z, log_det = layer(torch.tensor([[0.75, 2.5, 1.0]]))
    >>> z
    tensor([[ 0.8125, -0.8125,  0.0000]])
    >>> layer.inverse(torch.tensor([[-1e4, 1e4, -1e4]]))[0] > 0
    tensor([[True, True, True]])
    """

    low: Tensor
    high: Tensor
    least: Tensor
    greatest: Tensor
    width: Tensor
    has_low: Tensor
    has_high: Tensor

    def __init__(self, shape, low: Bound = 0.0, high: Bound = 1.0, context_shape=None):
        super().__init__(shape, context_shape)
        self.bounds = _bounds("low", low, -math.inf, self.shape), _bounds("high", high, math.inf, self.shape)
        low32, high32 = (bound.float() for bound in self.bounds)
        inner = torch.nextafter(low32, high32) < torch.nextafter(high32, low32)
        if not (inner & ~((high32 - low32).isinf() & low32.isfinite() & high32.isfinite())).all():
            raise ValueError(f"low={low} must be below high={high}, by more than float32 resolves")
        for name, value in self._numbers(torch.get_default_dtype()).items():
            # not in the state dict: the arguments say them, to all digits
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def _numbers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        exact_low, exact_high = self.bounds
        has_low, has_high = exact_low.isfinite(), exact_high.isfinite()
        low, high, info = exact_low.to(dtype), exact_high.to(dtype), torch.finfo(dtype)
        least, greatest = torch.nextafter(low, high), torch.nextafter(high, low)
        return {
            "low": torch.where(has_low, low, 0.0),
            "high": torch.where(has_high, high, 0.0),
            "width": torch.where(has_low & has_high, high - low, 1.0),
            # of samples: the numbers next to the bounds
            "least": torch.where(low == 0, _smallest(dtype), least).clamp(min=info.min),
            "greatest": torch.where(high == 0, -_smallest(dtype), greatest).clamp(max=info.max),
            "has_low": has_low,
            "has_high": has_high,
        }

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, value in self._numbers(self.low.dtype).items():  # rounded once, from all digits
            setattr(self, name, value.to(self.low.device))
        return self

    def explain(self, x):
        lows, highs = (bound.flatten().tolist() for bound in self.bounds)
        for i, (value, low, high) in enumerate(zip(x.flatten().tolist(), lows, highs)):
            closed = math.isfinite(low) and math.isfinite(high)
            if not (low <= value <= high if closed else low < value < high):
                interval = f"[{low:g}, {high:g}]" if closed else f"({low:g}, {high:g})"
                return f"number {i} is {value:g}, outside {interval}"
        return None

    @property
    def constraint(self):
        both = (bound.to(self.low.device) for bound in self.bounds)
        return constraints.independent(constraints.interval(*both), len(self.shape))

    def forward(self, x, context=None):
        z, log_derivatives = self.log_derivatives(x)
        return z, sum_event(log_derivatives)

    def log_derivatives(self, x, context=None):
        with full_precision(x):
            two_sided = self.has_low & self.has_high
            margin = torch.finfo(x.dtype).eps / 2 * self.width
            above = torch.where(self.has_low, x - self.low, 1.0)
            below = torch.where(self.has_high, self.high - x, 1.0)
            above, below = (gap + margin * (two_sided & (gap == 0)) for gap in (above, below))
            inside = (above > 0) & (below > 0)
            from_low = torch.where(two_sided, above < below, self.has_low)
            gap = torch.where(inside, torch.where(from_low, above, below), self.width) / self.width
            y, log_slope = to_line(gap, two_sided)
            z = torch.where(self.has_low | self.has_high, torch.where(from_low, y, -y), x)
            return z.where(inside, math.nan), log_slope - self.width.log()

    def inverse(self, z, context=None):
        with full_precision(z):
            two_sided, is_bounded = self.has_low & self.has_high, self.has_low | self.has_high
            from_low = torch.where(two_sided, z < 0, self.has_low)  # the nearer bound, from which x has more digits
            gap, log_slope = from_line(torch.where(from_low, z, -z), two_sided)
            gap = self.width * gap
            x = torch.where(from_low, self.low + gap, self.high - gap).clamp(self.least, self.greatest)
            log_derivative = torch.where(is_bounded, log_slope + self.width.log(), 0.0)
            return torch.where(is_bounded, x, z), sum_event(log_derivative)


class Positive(Box):
    """Positive numbers to all real numbers: z = log x. 0 is not positive.

    >>> Positive((2,))(torch.tensor([[1.0, torch.e]]))[0]
    tensor([[0., 1.]])
    """

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, low=0.0, high=None, context_shape=context_shape)

    @property
    def constraint(self):
        return constraints.independent(constraints.positive, len(self.shape))


class Simplex(Support):
    """K numbers of at least 0 with the sum 1 to K − 1 real numbers: zₖ = log(xₖ/x_K) (Aitchison 1982, section 2.1: the
    additive log-ratio).

    Densities are with respect to the first K − 1 numbers, as those of torch's Dirichlet distribution. A 0, which would
    map to −∞, counts as half a rounding of 1.

    Raises:
        ValueError: ``shape`` is not that of a vector of at least 2 numbers.

    >>> z, log_det = Simplex((3,))(torch.tensor([[0.2, 0.4, 0.4]]))
    >>> z.shape
    torch.Size([1, 2])
    >>> Simplex((3,)).inverse(torch.tensor([[1e4, -1e4]]))[0] > 0
    tensor([[True, True, True]])
    """

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        if len(self.shape) != 1 or self.shape[0] < 2:
            raise ValueError(f"a simplex has vectors of at least 2 numbers, not {list(self.shape)}")
        self.out_shape = (self.shape[0] - 1,)

    @property
    def constraint(self):
        return constraints.simplex

    def free(self, x):
        return x[..., :-1]

    def lift(self, free):
        return torch.cat((free, 1 - free.sum(-1, keepdim=True)), -1)

    def mend(self, x):
        x = x.clamp(min=1e-6)
        return x / x.sum(-1, keepdim=True)  # which is not 1 where x was rounded to float32

    def explain(self, x):
        for i, value in enumerate(x.tolist()):
            if not value >= 0:
                return f"number {i} is {value:g}, below 0"
        return None if self._is_inside(x) else f"the sum is {x.double().sum():.7g}, not 1; divide by it"

    def forward(self, x, context=None):
        with full_precision(x):
            log_x = (x + torch.finfo(x.dtype).eps / 2 * (x == 0)).clamp(min=_smallest(x.dtype)).log()
            z = torch.where(self._is_inside(x)[:, None], log_x[:, :-1] - log_x[:, -1:], math.nan)
            return z, -log_x.sum(1)

    def inverse(self, z, context=None):
        with full_precision(z):
            logits, info = F.pad(z, (0, 1)), torch.finfo(z.dtype)
            x = logits.softmax(1).clamp(_smallest(z.dtype), 1 - info.eps / 2)
            return x, logits.log_softmax(1).sum(1)

    def _is_inside(self, x: Tensor) -> Tensor:
        tolerance = max(1e-6, size(self.shape) * torch.finfo(x.dtype).eps)  # 1e-6 is torch's
        return (x >= 0).all(-1) & ((x.sum(-1) - 1).abs() <= tolerance)


def support_of(bijection: Bijection) -> Support | None:
    """The first layer of a chain, if it is one that bounds the data."""
    layer: Bijection | None = bijection
    while layer is not None and is_sequence(layer):
        layer = next(iter(layer.layers().values()), None)
    return layer if isinstance(layer, Support) else None


def _smallest(dtype: torch.dtype) -> float:
    """A positive number whose inverse is far from overflow, so that gradients are finite."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def _bounds(name: str, given: Bound, absent: float, shape: tuple[int, ...]) -> Tensor:
    """One bound for each number of an event, in float64 on the CPU."""

    def numbers(value):
        if isinstance(value, Sequence | Tensor) and not isinstance(value, str):
            return [numbers(one) for one in value]
        return absent if value is None else float(value)

    try:
        bound = torch.tensor(numbers(given), dtype=torch.float64, device="cpu")
        whole = bound.expand(shape) if bound.dim() in (0, len(shape)) else None
    except (TypeError, ValueError, RuntimeError):
        whole = None
    if whole is None or whole.isnan().any() or (whole == -absent).any():
        what = f"a number or null, or {' × '.join(map(str, shape))} of them"
        raise ValueError(f"{name}={given} must be {what}")
    return whole.clone()
