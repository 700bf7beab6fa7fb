"""Coupling: one part of an event sets the map of the other; and the ways of parting it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, full_precision, size, sum_event
from flowtrain.bijections.univariate import Univariate, per_element


class Partition(nn.Module):
    """Who sees and who moves. ``seen_shape`` is what the conditioner gets, ``moved_shape`` what its map acts on."""

    seen_shape: tuple
    moved_shape: tuple

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> seen, moved."""
        raise NotImplementedError

    def merge(self, seen: Tensor, moved: Tensor) -> Tensor:
        """Of both parts one event again."""
        raise NotImplementedError

    def count(self, log_derivative: Tensor) -> Tensor:
        """The log-determinant (B,) from the log-derivative of every moved element."""
        return sum_event(log_derivative)


class Halves(Partition):
    """Halves of the channels: the first sees and the second moves, or with ``swap`` the other way."""

    def __init__(self, shape, swap: bool = False):
        super().__init__()
        channels, *rest = shape
        if channels < 2:
            raise ValueError(f"a shape of {list(shape)} has no two halves of channels; squeeze it first")
        self.swap, self.first = swap, channels // 2
        first, second = (self.first, *rest), (channels - self.first, *rest)
        self.seen_shape, self.moved_shape = (second, first) if swap else (first, second)

    def split(self, x):
        first, second = x.split([self.first, x.shape[1] - self.first], 1)
        return (second, first) if self.swap else (first, second)

    def merge(self, seen, moved):
        return torch.cat((moved, seen) if self.swap else (seen, moved), 1)


class Alternate(Partition):
    """Every second channel (of a vector: dimension) moves, from number ``first`` on (NICE's partition)."""

    def __init__(self, shape, first: int = 0):
        super().__init__()
        channels, *rest = shape
        if channels < 2:
            raise ValueError(f"a shape of {list(shape)} has no second channel")
        if first not in (0, 1):
            raise ValueError(f"first={first} must be 0 or 1")
        self.first = first
        moved = len(range(first, channels, 2))
        self.seen_shape, self.moved_shape = (channels - moved, *rest), (moved, *rest)

    def split(self, x):
        return x[:, 1 - self.first :: 2], x[:, self.first :: 2]

    def merge(self, seen, moved):
        out = moved.new_empty(len(moved), seen.shape[1] + moved.shape[1], *moved.shape[2:])
        out[:, 1 - self.first :: 2], out[:, self.first :: 2] = seen, moved
        return out


class Checkerboard(Partition):
    """Pixels of one colour of a checkerboard see, those of the other move (Dinh et al. 2017, section 3.4).

    The conditioner works on the whole picture with the moving pixels at 0. ``colour`` 0 moves the pixels whose row
    and column sum to an odd number, so that the top-left one is seen first, as in the reference code.
    """

    def __init__(self, shape, colour: int = 0):
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"a checkerboard needs pictures (channels, height, width), not {list(shape)}")
        if colour not in (0, 1):
            raise ValueError(f"colour={colour} must be 0 or 1")
        _, height, width = shape
        row, column = torch.arange(height)[:, None], torch.arange(width)
        self.register_buffer("moves", (row + column + colour) % 2 == 1, persistent=False)
        self.seen_shape = self.moved_shape = tuple(shape)

    def split(self, x):
        return x.masked_fill(self.moves, 0), x

    def merge(self, seen, moved):
        return torch.where(self.moves, moved, seen)

    def count(self, log_derivative):
        return sum_event(log_derivative.masked_fill(~self.moves, 0))


class Coupling(Bijection):
    """z_seen = x_seen, z_moved = τ(x_moved; net(x_seen)) (Dinh et al. 2015, 2017).

    ``univariate`` is called with the moved shape, ``net`` as ``net(shape=seen, out=channels, context_shape=…)`` and
    maps ``(B, *seen)`` to ``(B, out, …)``. ``seen``, where given, builds a bijection of the seen shape that maps that
    part too, once it has been seen: z_seen = seen(x_seen) (Durkan et al. 2019, appendix B.1).
    """

    def __init__(
        self,
        shape,
        univariate: Callable[..., Univariate],
        net: Callable[..., nn.Module],
        partition: Callable[..., Partition] = Halves,
        seen: Callable[..., Bijection] | None = None,
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        self.partition = partition(shape=self.shape)
        moved = self.partition.moved_shape
        self.univariate = univariate(shape=moved)
        self.net = net(
            shape=self.partition.seen_shape, out=moved[0] * self.univariate.params, context_shape=context_shape
        )
        if seen is not None and size(self.partition.seen_shape) + size(moved) > size(self.shape):
            raise ValueError(f"seen: {type(self.partition).__name__} gives the conditioner what moves too, at 0")
        self.seen = seen and seen(shape=self.partition.seen_shape, context_shape=context_shape)

    def forward(self, x, context=None):
        seen, moved = self.partition.split(x)
        moved, log_det = self._map(self.univariate, moved, self._theta(seen, context))
        if self.seen is not None:
            seen, log_det_seen = self.seen(seen, context)
            log_det = log_det + log_det_seen
        return self.partition.merge(seen, moved), log_det

    def inverse(self, z, context=None):
        seen, moved = self.partition.split(z)
        log_det_seen = 0
        if self.seen is not None:
            seen, log_det_seen = self.seen.inverse(seen, context)
        moved, log_det = self._map(self.univariate.inverse, moved, self._theta(seen, context))
        return self.partition.merge(seen, moved), log_det + log_det_seen

    def clues(self, x):
        seen, moved = self.partition.split(x)
        return (seen,) if self.univariate.smooth else (seen, moved)

    def retrace(self, z, context=None, mend=lambda clue: clue):
        """With one evaluation of the network."""
        with torch.no_grad():
            seen, moved = self.partition.split(z)
            if self.seen is not None:
                seen, _ = self.seen.inverse(seen, context)
            leaf = self.partition.merge(mend(seen), torch.zeros_like(moved))
        seen, unknown = self.partition.split(leaf.requires_grad_())
        theta = self._theta(seen, context)
        with torch.no_grad():
            moved = mend(self._map(self.univariate.inverse, moved, theta)[0])
            x = self.partition.merge(seen, moved)
            known = self.partition.split(x)[1] - unknown  # what moved, found after the network had seen the rest
        moved, log_det = self._map(self.univariate, unknown + known, theta)
        if self.seen is not None:
            seen, log_det_seen = self.seen(seen, context)
            log_det = log_det + log_det_seen
        return x, leaf, self.partition.merge(seen, moved), log_det

    def _theta(self, seen, context):
        return per_element(self.net(seen, context).to(seen.dtype), self.univariate.params)

    def _map(self, univariate, moved, theta):
        with full_precision(moved):
            moved, log_derivative = univariate(moved, theta)
            return moved, self.partition.count(log_derivative)
