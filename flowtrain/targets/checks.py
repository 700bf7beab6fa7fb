"""Whether a target can be trained on, seen on a first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.errors import UsageError
from flowtrain.targets.target import Target


def check_target(target: Target, x: Tensor) -> None:
    """Raise UsageError, which names the target and what is wrong, for a ``log_prob`` of x (B, D) of the wrong shape,
    without a gradient, or with values that no density has; or for a ``sample`` that does not return what it should."""
    what = f"target {target.name}"
    _check_log_prob(target, what, x)
    _check_sample(target, what)


def _check_sample(target: Target, what: str) -> None:
    n = target.dimensions + 1  # not D, so that its axes cannot be swapped
    call = f"sample({n}, generator)"
    try:
        x = target.sample(n, torch.Generator().manual_seed(0))
    except Exception as error:  # of a user's own function
        raise UsageError(f"{what}: {call} fails: {_one_line(error)}") from error
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise UsageError(f"{what}: {call} must return a tensor, not a {type(x).__name__}")
    if x.shape != (n, target.dimensions) or x.dtype != torch.float32 or x.device.type != "cpu":
        found = f"{list(x.shape)} of {x.dtype} on {x.device}".replace("torch.", "")
        raise UsageError(f"{what}: {call} must return {[n, target.dimensions]} of float32 on the CPU, not {found}")
    if not x.isfinite().all():
        raise UsageError(f"{what}: {call} returns numbers that are not finite")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _check_log_prob(target: Target, what: str, x: Tensor) -> None:
    x = x.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            value = target.log_prob(x)
    except Exception as error:  # of a user's own function
        raise UsageError(f"{what}: it fails on x of shape {list(x.shape)}: {_one_line(error)}") from error
    if not isinstance(value, Tensor):
        raise UsageError(f"{what}: it must return a tensor, not a {type(value).__name__}")
    if value.shape != x.shape[:1]:
        raise UsageError(
            f"{what}: it returns shape {list(value.shape)} for x of shape {list(x.shape)}; it must return one number "
            f"for each row, {list(x.shape[:1])}"
        )
    if not value.is_floating_point():
        raise UsageError(f"{what}: it must return real numbers, not {value.dtype}")
    values = value.detach()
    for word, wrong in (("NaN", values.isnan()), ("+inf", values == torch.inf)):
        if wrong.any():
            raise UsageError(f"{what}: it is {word} at {_count(wrong)} starting points, the first {_show(x, wrong)}")
    outside = values == -torch.inf
    if outside.any():
        raise UsageError(
            f"{what}: it is -inf, a density of zero, at {_count(outside)} starting points, the first "
            f"{_show(x, outside)}; the divergence from a flow with samples there is infinite: transform x so that "
            "every point has a density, or give a smaller target.scale"
        )
    if not value.requires_grad:
        raise UsageError(f"{what}: its value is detached: it has no gradient in x; compute it with torch from x itself")
    (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    if gradient is None:
        raise UsageError(f"{what}: its value does not depend on x")
    bad = ~gradient.isfinite().all(1)
    if bad.any():
        raise UsageError(f"{what}: its gradient is not finite at {_count(bad)} starting points, {_show(x, bad)}")


def _count(which: Tensor) -> str:
    return f"{int(which.sum())} of {len(which)}"


def _show(x: Tensor, which: Tensor) -> str:
    """The first of the points, with at most four numbers."""
    point = x.detach()[which][0]
    numbers = ", ".join(f"{value:.3g}" for value in point[:4].tolist())
    return f"x = [{numbers}{', …' if len(point) > 4 else ''}]"
