"""Adaptive Runge-Kutta steps of a size of its own for each row, so that no row depends on the others of its batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowtrain.bijections.bijection import sum_event

FIRST = 0.01  # share of the way
LONGEST = 0.5  # likewise, at a tolerance of 1e-3: in a longer step the stages may miss how a velocity varies with time
LARGEST, SMALLEST, SAFETY = 10.0, 0.2, 0.9  # factors of the next step, as torchdiffeq's

Rates = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def solve_rows(
    rates: Rates,
    state: tuple[Tensor, ...],
    start: float,
    end: float,
    method: str,
    rtol: float,
    atol: float,
    before_step: Callable[[Tensor, tuple[Tensor, ...], Tensor], None],
) -> tuple[Tensor, ...]:
    """The state at the time ``end`` of one that is ``state`` at ``start``: dy/dt = rates(t, y).

    A step of a row is accepted where the root mean squares of its error in each part of the state, in units of
    ``atol + rtol·|y|``, are at most 1. All rows take their steps side by side until the last has arrived.

    Args:
        rates: of the state, given the times (B, 1, …) of the rows, with as many axes as the state's first part.
        state: tensors (B, …).
        method: an adaptive one of torchdiffeq, whose tableau is used.
        before_step: called before each step with the share of the way that each row has gone, (B,), the state, and the
            share that it will go, 1 for one that has arrived; it raises where the solve should end.
    """
    from torchdiffeq._impl.odeint import SOLVERS  # brings all of scipy

    first = state[0]
    tableau, order = SOLVERS[method].tableau, SOLVERS[method].order
    stages = list(zip(tableau.alpha.tolist(), [row.tolist() for row in tableau.beta]))
    weights, errors = tableau.c_sol.tolist(), tableau.c_error.tolist()
    ends_at_solution = weights == [*stages[-1][1], 0.0]  # the last slope is then the first of the next step
    way = end - start
    gone = first.new_zeros(len(first))
    step = torch.full_like(gone, FIRST)
    longest = LONGEST * min(1.0, rtol / 1e-3) ** (1 / order)  # moves with the tolerance, so that errors show

    def slopes_at(share: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(way * rate for rate in rates(_along(start + way * share, first), at))

    slope = slopes_at(gone, state)
    while not bool((gone >= 1).all()):
        step = torch.minimum(step, 1 - gone).clamp(max=longest)
        before_step(gone, state, torch.where(gone < 1, step, 1))
        slopes = [slope]
        for share, row in stages:
            after = _move(state, slopes, row, step)
            slopes.append(slopes_at((gone + share * step).clamp(max=1), after))
        if not ends_at_solution:
            after = _move(state, slopes, weights, step)
        with torch.no_grad():
            ratio = _ratio(state, after, _move(tuple(map(torch.zeros_like, state)), slopes, errors, step), rtol, atol)
            accepted = ratio <= 1
            factor = SAFETY * ratio.clamp(min=1e-10) ** (-1 / order)
            factor = torch.where(accepted, factor.clamp(1.0, LARGEST), factor.clamp(SMALLEST, 1.0)).nan_to_num(SMALLEST)
        state = _where(accepted, after, state)
        last = step >= 1 - gone
        gone = torch.where(accepted, torch.where(last, torch.ones_like(gone), gone + step), gone)
        slope = _where(accepted, slopes[-1], slope) if ends_at_solution else slopes_at(gone, state)
        step = step * factor
    return state


def _along(share: Tensor, x: Tensor) -> Tensor:
    """(B,) with as many axes as x."""
    return share.view(-1, *[1] * (x.dim() - 1))


def _move(state: tuple[Tensor, ...], slopes: list[tuple[Tensor, ...]], weights: list[float], step: Tensor):
    """The state moved by each row's step along the weighted slopes."""
    moved = []
    for part, rates in zip(state, zip(*slopes)):
        change = sum(weight * rate for weight, rate in zip(weights, rates) if weight)
        moved.append(part + _along(step, part) * change)
    return tuple(moved)


def _where(accepted: Tensor, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(_along(accepted, a), a, b) for a, b in zip(one, other))


def _ratio(before, after, error, rtol: float, atol: float) -> Tensor:
    """The greatest over the parts of the state of the root mean square error in units of what is allowed, (B,)."""
    ratios = []
    for a, b, e in zip(before, after, error):
        scaled = (e / (atol + rtol * torch.maximum(a.abs(), b.abs()))).square()
        ratios.append((sum_event(scaled) / max(1, scaled[0].numel()) if scaled.dim() > 1 else scaled).sqrt())
    return torch.stack(ratios).amax(0)
