"""Checks of batches of events, before and after a function of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.runtime import modes


def as_tensor(name: str, x: Any, device: torch.device) -> Tensor:
    """``x``, a tensor, an array or nested lists of numbers, as a tensor; what is none yet comes to ``device``.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(x, Tensor):
        return x
    try:
        return torch.from_numpy(np.array(x, order="C")).to(device)  # a copy: not every array can be shared
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{name} must be a tensor, an array or nested lists of numbers, not {type(x).__name__}"
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error


def batch_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> torch.Size:
    """The batch of ``x`` (*batch, *shape). ValueError if its events have another shape."""
    batch, events = x.shape[: x.dim() - len(shape)], x.shape[max(0, x.dim() - len(shape)) :]
    if events != shape:
        raise ValueError(f"{name} has events of shape {list(events)}; this flow takes {list(shape)}")
    return batch


def repeat_events(x: Tensor, batch: torch.Size, shape: tuple[int, ...]) -> Tensor:
    """Events of ``shape`` broadcast to ``batch``, as the rows of one tensor."""
    if x.dim() == 1 + len(shape) and x.shape[:1] == batch:
        return x
    return x.expand(*batch, *shape).reshape(prod(batch), *shape)


def distinct(x: Tensor, batch: int) -> Tensor:
    """``x`` with a size of 1 in those of its first ``batch`` dimensions along which it was expanded."""
    return x[tuple(slice(None) if stride else slice(0, 1) for stride in x.stride()[:batch])]


def check_rows(name: str, x: Tensor, dtype: torch.dtype, hide: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Rows ``x`` (B, ...) in ``dtype``. ``hide`` replaces the numbers of x that need not be finite.

    Raises:
        ValueError: it is complex, or has a row that is not finite.
    """
    if x.is_complex():
        raise ValueError(f"{name} holds complex numbers")
    x = x.to(dtype)
    if (row := _first_not_finite(x if hide is None else hide(x))) is not None:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"row {row} of {name} holds a number that is not finite in {kind}")
    return x


def map_events(
    name: str,
    x: Tensor,
    context: Tensor | None,
    what: str,
    function: Callable[..., Tensor],
    hide: Callable[[Tensor], Tensor] | None = None,
    explain: Callable[[Tensor], str] = lambda row: "",
    most: int | None = None,
) -> Tensor:
    """``function(x, context)``, each row of which is the ``what`` of a row of x. ``hide`` replaces the numbers of it
    that need not be finite; ``explain`` says more of a row without a finite one. ``function`` gets at most ``most``
    rows at a time.

    Raises:
        ValueError: a row of it is not finite, or ``function`` raised FloatingPointError.
    """
    try:
        result = _map_parts(function, x, context, most)
    except FloatingPointError as error:
        first = _first_failure(function, x, context)
        raise ValueError(f"{_row(name, x, first)} {what}: {error}") from error
    if (row := _first_not_finite(result if hide is None else hide(result))) is not None:
        raise ValueError(f"{_row(name, x, row)} {what} that is finite{explain(x[row])}")
    return result


def _map_parts(function: Callable[..., Tensor], x: Tensor, context: Tensor | None, most: int | None) -> Tensor:
    if most is None or len(x) <= most:
        return function(x, context)
    contexts = repeat(None) if context is None else context.split(most)
    return torch.cat([function(*part) for part in zip(x.split(most), contexts)])


def _row(name: str, x: Tensor, row: int) -> str:
    low, high = x[row][~x[row].isnan()].aminmax()
    return f"row {row} of {name}, of numbers from {low:g} to {high:g}, has no"


def _first_not_finite(x: Tensor) -> int | None:
    if not modes.values_are_known():
        return None
    finite = x.isfinite()
    if finite.all():
        return None
    return int((~finite).reshape(len(x), -1).any(1).nonzero()[0])


def _first_failure(function: Callable, x: Tensor, context: Tensor | None) -> int:
    """The first row for which ``function`` raises FloatingPointError, by bisection; there is one."""
    first, end = 0, len(x)
    while end - first > 1:
        middle = (first + end) // 2
        try:
            function(x[first:middle], None if context is None else context[first:middle])
            first = middle
        except FloatingPointError:
            end = middle
    return first
