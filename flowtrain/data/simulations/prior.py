"""Priors of simulators: uniform and normal parameters by name, or a distribution that a function makes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from flowtrain.errors import UsageError

HOW = "a mapping from names to [low, high] or {mean: …, std: …}, or module:function, which makes a distribution"


class Product:
    """Independent parameters: uniform between two ends, or normal.

    Args:
        parts: a mapping from the name of each parameter to ``[low, high]`` or ``{"mean": …, "std": …}``.

    Raises:
        UsageError: a parameter is neither.

    >>> Product({"rate": [0, 2], "offset": {"mean": 1, "std": 3}}).ends
    [(0.0, 2.0), (None, None)]
    """

    def __init__(self, parts: Mapping[str, Any]):
        self.names = [str(name) for name in parts]
        self.ends: list[tuple[float | None, float | None]] = []
        low, width, normal = [], [], []
        for name, part in parts.items():
            if isinstance(part, Mapping) and {*part} == {"mean", "std"} and _numbers(part.values()) and part["std"] > 0:
                ends, first, second = (None, None), part["mean"], part["std"]
            elif isinstance(part, Sequence) and len(part) == 2 and _numbers(part) and part[0] < part[1]:
                ends, first, second = (float(part[0]), float(part[1])), part[0], part[1] - part[0]
            else:
                raise UsageError(
                    f"dataset.prior.{name}={part}: must be [low, high], two numbers, or {{mean: …, std: …}}"
                )
            self.ends.append(ends)
            low.append(first)
            width.append(second)
            normal.append(ends == (None, None))
        if not self.ends:
            raise UsageError("dataset.prior={}: it has no parameters")
        self.low, self.width = torch.tensor([low, width], dtype=torch.float64)
        self.normal = torch.tensor(normal)
        self.least, self.greatest = limits(self.ends)

    def sample(self, shape: tuple[int]) -> Tensor:
        shape = (*shape, len(self.names))
        uniform, normal = torch.rand(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        theta = self.low + self.width * torch.where(self.normal, normal, uniform)
        return theta.float().clamp(self.least, self.greatest)  # float32 may have rounded outwards


class Made:
    """A prior that a function of the user's own makes.

    Args:
        make: without arguments, returns a ``torch.distributions.Distribution`` of vectors.
        given: as the user named it.

    Raises:
        UsageError: it returns something else, or a distribution whose support is not an interval, a half-line or the
            real line in each dimension.
    """

    def __init__(self, make: Callable[[], Distribution], given: str):
        try:
            prior = make()
        except Exception as error:  # whatever a user's function raises
            raise UsageError(f"dataset.prior={given}: {type(error).__name__}: {error}") from error
        if not isinstance(prior, Distribution):
            raise UsageError(f"dataset.prior={given}: returns a {type(prior).__name__}, not a torch Distribution")
        if prior.batch_shape:
            prior = Independent(prior, len(prior.batch_shape))
        if len(prior.event_shape) > 1:
            raise UsageError(f"dataset.prior={given}: its samples have shape {list(prior.event_shape)}, not a vector's")
        self.prior, count = prior, prior.event_shape.numel()
        try:
            self.ends = broadcast_ends(support_ends(prior.support), count)
        except ValueError as error:
            raise UsageError(f"dataset.prior={given}: {error}") from error
        self.names = [f"theta{i}" for i in range(count)]

    def sample(self, shape: tuple[int]) -> Tensor:
        return self.prior.sample(shape).reshape(*shape, -1).float().cpu()


def make_prior(given: Any, find: Callable[[str, str], Callable]) -> tuple[Product | Made, str]:
    """The prior that ``dataset.prior`` describes, and a text that changes with it.

    Args:
        find: returns the function that a key names, of a module that the user allows.
    """
    if isinstance(given, Mapping):
        return Product(given), json.dumps(
            {name: list(part) if isinstance(part, list | tuple) else part for name, part in given.items()}
        )
    if isinstance(given, str):
        return Made(find("dataset.prior", given), given), given
    raise UsageError(f"dataset.prior={given}: give {HOW}")


def support_ends(support: constraints.Constraint) -> Iterator[tuple[float | None, float | None]]:
    """(low, high) of each dimension of a support, None where it has no bound.

    Raises:
        ValueError: it is not an interval, a half-line or the real line in each dimension.
    """
    if isinstance(support, constraints.independent):
        yield from support_ends(support.base_constraint)
    elif isinstance(support, constraints.cat):
        for part, length in zip(support.cseq, support.lengths):
            yield from broadcast_ends(support_ends(part), length)
    else:
        low, high = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
        if support.is_discrete or support is not constraints.real and low is high is None:
            raise ValueError(f"its support, {support}, is not an interval or a half-line in each dimension")
        count = max(torch.as_tensor(0.0 if end is None else end).numel() for end in (low, high))
        yield from zip(each_end(low, count), each_end(high, count))


def limits(ends: Sequence[tuple[float | None, float | None]]) -> tuple[Tensor, Tensor]:
    """The lower and the upper ends, (D,) each; ±∞ where there is none.

    >>> limits([(0.0, 1.0), (None, None)])
    (tensor([0., -inf]), tensor([1., inf]))
    """
    low, high = zip(*ends)
    return (
        torch.tensor([-math.inf if end is None else end for end in low]),
        torch.tensor([math.inf if end is None else end for end in high]),
    )


def broadcast_ends(ends, count: int) -> list[tuple[float | None, float | None]]:
    """The ends of ``count`` dimensions, of which those of one dimension may stand for all. Raises ValueError."""
    ends = list(ends)
    ends = ends * count if len(ends) == 1 else ends
    if len(ends) != count:
        raise ValueError(f"bounds of {len(ends)} dimensions for rows of {count}")
    return ends


def each_end(end: Any, count: int) -> list[float | None]:
    """One bound for each of ``count`` dimensions, of a number, a tensor or None; None where it is infinite."""
    if end is None:
        return [None] * count
    values = torch.as_tensor(end, dtype=torch.float64).flatten().expand(count).tolist()
    return [value if abs(value) < math.inf else None for value in values]


def _numbers(values) -> bool:
    """Whether all are finite numbers."""
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
