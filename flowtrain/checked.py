"""A map of examples with what goes in and what comes out looked at: finite, or a ValueError that names the row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def taken(name: str, x: Tensor, shape: tuple, dtype: torch.dtype) -> Tensor:
    """``x`` (B, *shape) in ``dtype``.

    Raises:
        ValueError: its shape is another, it is complex, or a row of it is not finite.
    """
    if x.shape[1:] != shape:
        raise ValueError(f"{name} has events of shape {list(x.shape[1:])}; this flow takes {list(shape)}")
    if x.is_complex():
        raise ValueError(f"{name} holds complex numbers")
    x = x.to(dtype)
    if (row := _first_not_finite(x)) is not None:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"row {row} of {name} holds a number that is not finite in {kind}")
    return x


def mapped(name: str, x: Tensor, context: Tensor | None, what: str, function: Callable[..., Tensor]) -> Tensor:
    """``function(x, context)``, row by row ``what`` of x.

    Raises:
        ValueError: a row of it is not finite, or ``function`` raised FloatingPointError.
    """
    try:
        made = function(x, context)
    except FloatingPointError as error:
        row = _first_refused(function, x, context)
        raise ValueError(f"{_row(name, x, row)} {what}: {error}") from error
    if (row := _first_not_finite(made)) is not None:
        raise ValueError(f"{_row(name, x, row)} {what} that is finite")
    return made


def _row(name: str, x: Tensor, row: int) -> str:
    low, high = x[row].aminmax()
    return f"row {row} of {name}, of numbers from {low:g} to {high:g}, has no"


def _first_not_finite(x: Tensor) -> int | None:
    finite = x.isfinite()
    if finite.all():
        return None
    return int((~finite).reshape(len(x), -1).any(1).nonzero()[0])


def _first_refused(function: Callable, x: Tensor, context: Tensor | None) -> int:
    """The first row that ``function`` raises FloatingPointError for, given rows among which there is one."""
    first, end = 0, len(x)
    while end - first > 1:
        middle = (first + end) // 2
        try:
            function(x[first:middle], None if context is None else context[first:middle])
            first = middle
        except FloatingPointError:
            end = middle
    return first
