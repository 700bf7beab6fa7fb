"""Suite ``spline``: the rational-quadratic spline alone, 10⁶ elements of 8 bins, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from flowtrain.benchmarks.ours import BINS
from flowtrain.benchmarks.session import COMPILED, OURS, TOLERANCE, Load, Row, Session, ratios
from flowtrain.bijections import RationalQuadratic

TARGETS = {OURS: 0.20, COMPILED: 0.12}
SIDE, SMOKE_SIDE = 1000, 8  # the square is the number of elements


def rows(session: Session) -> Iterator[Row]:
    side = SMOKE_SIDE if session.smoke else SIDE
    x = (2 * torch.randn(side, side)).to(session.device)
    theta = torch.randn(side, side, 3 * BINS - 1).to(session.device)
    ours = RationalQuadratic((side,), bins=BINS)
    functions: dict[str, Callable] = {OURS: ours, **_peers(session)}
    for name, function in functions.items():
        _check_log_derivative(session, name, function, x[:8].double(), theta[:8].double())
    few = x[:8].double(), theta[:8].double()
    for name in {"nflows", "normflows"} & {*functions}:
        session.check(f"spline, {name}: ours", _error(functions[name](*few), ours(*few)), TOLERANCE)
    if session.compiled:
        torch.compiler.reset()
        functions[COMPILED] = torch.compile(ours, fullgraph=True, dynamic=False)
        # float32: steep and narrow bins magnify rounding errors, so both are compared with float64
        exact = ours(x.double(), theta.double())
        rounding, error = (_error(functions[name](x, theta), exact) for name in (OURS, COMPILED))
        session.check("spline, compiled: ours", error, 10 * rounding)
    x, theta = x.requires_grad_(), theta.requires_grad_()
    times = session.times({name: _forward_and_backward(function, x, theta) for name, function in functions.items()})
    work = f"spline forward and backward, {side * side:,} elements of {BINS} bins"
    load = Load(side * side, "elements")
    if "nflows" in times:
        yield from ratios("spline", work, times, "nflows", TARGETS, load)
    else:
        yield from ratios("spline", work, times, OURS, {}, load)


def _peers(session: Session) -> dict[str, Callable]:
    """The peers' splines with the parameters of ours: one tensor, in which 0 means a slope of 1."""
    unit_slope = math.log(math.expm1(1 - 1e-3))

    def adapt(function, shift):
        def run(x: Tensor, theta: Tensor):
            widths, heights, slopes = theta.split([BINS, BINS, BINS - 1], -1)
            return function(x, widths, heights, slopes + shift)

        return run

    found = session.peers_with("spline")
    return {name: adapt(function, 0.0 if name == "zuko" else unit_slope) for name, function in found.items()}


def _check_log_derivative(session: Session, name: str, function: Callable, x: Tensor, theta: Tensor) -> None:
    """Check that the log-derivative is autograd's."""
    x = x.clone().requires_grad_()
    y, log_derivative = function(x, theta)
    (slope,) = torch.autograd.grad(y.sum(), x)
    session.check(f"spline, {name}: log-derivative", (slope.log() - log_derivative).abs().max().item(), TOLERANCE)


def _error(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected))


def _forward_and_backward(function: Callable | nn.Module, x: Tensor, theta: Tensor) -> Callable[[], None]:
    def run() -> None:
        y, log_derivative = function(x, theta)
        torch.autograd.grad(y.sum() + log_derivative.sum(), (x, theta))

    return run
