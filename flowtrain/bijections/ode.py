"""Continuous-time flows: an ordinary differential equation as a layer (Grathwohl et al. 2019, FFJORD)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowtrain.bijections.bijection import Bijection, at_least_float32, full_precision, size, sum_event, zero_log_det
from flowtrain.runtime import globalbatch

EXACT_LIMIT = 128  # dimensions up to which an evaluation should enter exact_trace: it costs a gradient for each of them
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")  # fehlberg2 misses its tolerance by a factor of 200
FIXED = ("rk4", "heun3", "midpoint", "euler")

_ROWS_AT_ONCE = 4096  # of an exact trace's gradients side by side, examples × dimensions: bounds its memory
_exact = False
_states_only = False
_unsolved: list[str] | None = None


@contextmanager
def exact_trace():
    """Within it, every :class:`Continuous` layer integrates the exact trace, whatever it is built with.

    Gradients, where any are taken, go through the solver's steps: those of what was computed, to the last digit.
    """
    global _exact
    previous, _exact = _exact, True
    try:
        yield
    finally:
        _exact = previous


@contextmanager
def states_only():
    """Within it, no :class:`Continuous` layer computes a trace: its log-determinant is NaN, at the cost of none."""
    global _states_only
    previous, _states_only = _states_only, True
    try:
        yield
    finally:
        _states_only = previous


@contextmanager
def unsolved_is_nan():
    """Within it, what would raise FloatingPointError is NaN, and so is its gradient; yields a list of the reasons.

    An error in one process of several would leave the others waiting where their gradients meet: all must go on to find
    together that the step is bad.
    """
    global _unsolved
    previous, _unsolved = _unsolved, []
    try:
        yield _unsolved
    finally:
        _unsolved = previous


def continuous_layers(module: nn.Module) -> list[Continuous]:
    """The continuous-time layers of a flow."""
    return [layer for layer in module.modules() if isinstance(layer, Continuous)]


def traced_exactly(module: nn.Module) -> bool:
    """Whether a flow has ODEs, each of so few dimensions that it is to be evaluated within :func:`exact_trace`."""
    layers = continuous_layers(module)
    return bool(layers) and all(size(layer.shape) <= EXACT_LIMIT for layer in layers)


class Continuous(Bijection):
    """z = x(T) of dx/dt = f(t, x), x(0) = x, with log-determinant ∫ tr ∂f/∂x dt (Grathwohl et al. 2019, eq. 4).

    The trace is estimated as εᵀ(∂f/∂x)ε with one ε for each example and solve (eq. 8): unbiased for the
    log-determinant, in training and evaluation. Within :func:`exact_trace` or with ``trace="exact"`` it is exact, at
    the cost of a gradient for each dimension. State and trace come from one evaluation of the net for each stage of the
    solver.

    Args:
        net: factory ``net(shape=…, context_shape=…)`` of f, called as ``f(t, x, context)``.
        time: T, or where it starts if ``learn_time``.
        solver: of torchdiffeq: adaptive (dopri5, dopri8, bosh3, adaptive_heun) with tolerances ``rtol`` and ``atol``,
            or fixed (rk4, heun3, midpoint, euler) with ``steps`` equal steps. The tolerances bound the root mean square
            over the batch in training, and that of each example in evaluation. An ``rtol`` below 8 roundings of the
            state's precision is taken as that.
        train_solver, train_tolerance: another solver, and another value of both tolerances, for training mode. What is
            evaluated and sampled is still the ODE's own solution. (Training finds and uses the errors of few fixed
            steps, unless a penalty keeps the ODE easy.)
        adjoint: gradients by a second solve backwards in time, in constant memory (Chen et al. 2018), with the error
            control of Kidger et al. 2021; else through the solver's steps, faster and exact for what they computed.
        trace: ``hutchinson`` or ``exact``.
        noise: of ε: ``rademacher`` or ``gaussian``.
        kinetic, jacobian: weights, in nats, of ∫|f|² dt and ∫|∂f/∂x|² dt, the latter estimated as |εᵀ∂f/∂x|² where the
            trace is (Finlay et al. 2020). In training they enter the gradient of the log-determinant and leave its
            value alone: a training loss reads as without them.
        max_steps: of an adaptive solver, in each direction.

    The net computes in float32 at least, under autocast too: an adaptive solver would spend its steps on following
    bfloat16's roundings.

    Raises:
        FloatingPointError: in forward, inverse or their gradient, where an adaptive solver cannot go on. A fixed one
            returns what is not finite.
    """

    reversible = False

    def __init__(
        self,
        shape,
        net: Callable[..., nn.Module],
        time: float = 1.0,
        learn_time: bool = False,
        solver: str = "dopri5",
        train_solver: str | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        train_tolerance: float | None = None,
        steps: int = 8,
        adjoint: bool = True,
        trace: str = "hutchinson",
        noise: str = "rademacher",
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        max_steps: int = 1000,
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        for name, value in {"time": time, "rtol": rtol, "atol": atol, "train_tolerance": train_tolerance}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        for name, value in {"steps": steps, "max_steps": max_steps}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, value in {"kinetic": kinetic, "jacobian": jacobian}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be at least 0")
        train_solver = train_solver or solver
        for name, value, options in (
            ("solver", solver, (*ADAPTIVE, *FIXED)),
            ("train_solver", train_solver, (*ADAPTIVE, *FIXED)),
            ("trace", trace, ("hutchinson", "exact")),
            ("noise", noise, ("rademacher", "gaussian")),
        ):
            if value not in options:
                raise ValueError(f"{name}='{value}' must be one of {', '.join(options)}")
        self.time, self.solver, self.train_solver = time, solver, train_solver
        self.rtol, self.atol, self.train_tolerance = rtol, atol, train_tolerance
        self.steps, self.max_steps = steps, max_steps
        self.adjoint, self.trace, self.noise = adjoint, trace, noise
        self.kinetic, self.jacobian = kinetic, jacobian
        # its square is T, which so stays positive
        self.sqrt_time = nn.Parameter(torch.tensor(math.sqrt(time))) if learn_time else None
        self.net = net(shape=self.shape, context_shape=context_shape)
        self.evaluations = 0  # of the net by the last forward or inverse, by its gradient's own solve too

    def statistics(self) -> dict[str, int]:
        """What a trainer may log."""
        return {"ode/evaluations": self.evaluations}

    def extra_repr(self):
        return f"{super().extra_repr()}, solver={self.solver}, train_solver={self.train_solver}"

    def forward(self, x, context=None):
        return self._solve(x, context, 0.0, 1.0)

    def inverse(self, z, context=None):
        return self._solve(z, context, 1.0, 0.0)

    @property
    def end_time(self) -> float | Tensor:
        """T."""
        return self.time if self.sqrt_time is None else self.sqrt_time.square()

    def _solve(self, x, context, start, end):
        """The state at ``end`` of one that is x at ``start``, in units of T, and the integral of the trace."""
        if torch.compiler.is_compiling():  # how many steps there are depends on values: no graph
            return torch.compiler.disable(Continuous._solve)(self, x, context, start, end)
        self.evaluations = 0
        x = x.to(at_least_float32(x.dtype))
        if not len(x):  # has no mean error to control
            return x, zero_log_det(x)
        if _unsolved is None or not torch.is_grad_enabled():
            return self._integrate(x, context, start, end)
        return _Attempt.apply(self, start, end, _unsolved, x, context, *self.parameters())

    def _integrate(self, x, context, start, end):
        from torchdiffeq import odeint, odeint_adjoint  # brings all of scipy

        differentiable = torch.is_grad_enabled()
        method = self.train_solver if self.training else self.solver
        rtol, atol = self.rtol, self.atol
        if self.training and self.train_tolerance:
            rtol = atol = self.train_tolerance
        penalized = self.training and differentiable and (self.kinetic > 0 or self.jacobian > 0)
        field = _Velocity(self, context) if _states_only else _Rates(self, x, context, penalized)
        times = torch.tensor([start, end], device=x.device, dtype=x.dtype)
        if method in FIXED:
            forth = back = {"grid_constructor": self._grid}
        else:  # a step ends at the end: torchdiffeq would step over it and interpolate, at a lower order
            forth, back = {"step_t": times[1:]}, {"step_t": times[:1]}
            field.callback_step, field.callback_step_adjoint = _Watch(self), _Watch(self)
        solve = odeint
        if self.adjoint and differentiable and not _exact:
            sources = [*self.parameters(), *([] if context is None else [context])]
            solve = partial(odeint_adjoint, adjoint_params=sources, adjoint_options=back | {"norm": "seminorm"})
        z, *integrals = solve(
            field,
            (x, *[zero_log_det(x)] * (0 if _states_only else 1 + penalized)),
            times,
            rtol=max(rtol, 8 * torch.finfo(x.dtype).eps),
            atol=atol,
            method=method,
            options=forth | {"norm": _mean_error if self.training else _greatest_error},
        )
        if _states_only:
            return z[-1], zero_log_det(x) + math.nan
        with full_precision(x):
            log_det, *penalty = integrals
            for one in penalty:
                one = one[-1] * (end - start)
                log_det = log_det - (one - one.detach())
            return z[-1], log_det[-1]

    def _grid(self, field, state, times):
        share = torch.linspace(0, 1, self.steps + 1, device=times.device, dtype=times.dtype)
        return times[0] + (times[-1] - times[0]) * share


class _Velocity:
    """The right-hand side of one solve, of the state alone.

    Time runs from 0 to 1, and the velocity is T times the net's, so that T needs no gradient of its own.
    """

    def __init__(self, layer: Continuous, context: Tensor | None):
        self.layer, self.context = layer, context

    def __call__(self, time: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with full_precision(state[0]):
            return (self.at(time, state[0]),)

    def at(self, time: Tensor, x: Tensor) -> Tensor:
        self.layer.evaluations += 1
        end_time = self.layer.end_time
        return end_time * self.layer.net(end_time * time, x, self.context)


class _Rates(_Velocity):
    """That of the state, of the log-determinant and, where penalized, of the penalty, from one velocity. The noise
    stays the same in all of a solve."""

    def __init__(self, layer: Continuous, x: Tensor, context: Tensor | None, penalized: bool):
        super().__init__(layer, context)
        self.penalized = penalized
        if _exact or layer.trace == "exact":
            directions = torch.eye(x[0].numel(), device=x.device, dtype=x.dtype)
            parts = directions.split(max(1, _ROWS_AT_ONCE // len(x)))
            self.probes = [part.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape) for part in parts]
        else:
            self.probes = [_NOISE[layer.noise](x)]

    def __call__(self, time, state):
        layer, differentiable = self.layer, torch.is_grad_enabled()
        x = state[0]
        with full_precision(x), torch.enable_grad():
            if not (differentiable and x.requires_grad):
                x = x.detach().requires_grad_()
            velocity = self.at(time, x)
            trace, norm = 0.0, 0.0  # Σ (eᵀJ)·e and Σ |eᵀJ|² over the probes e, J the velocity's Jacobian
            for probe in self.probes:
                many = probe.dim() > x.dim()
                (pulled,) = torch.autograd.grad(
                    velocity, x, probe, retain_graph=True, create_graph=differentiable, is_grads_batched=many
                )
                trace = trace + _sum(pulled * probe, many)
                if self.penalized:
                    norm = norm + _sum(pulled.square(), many)
            rates = [velocity, trace]
            if self.penalized:
                energy = layer.kinetic * sum_event(velocity.square()) + layer.jacobian * norm
                rates.append(energy / layer.end_time)
        return tuple(rates if differentiable else (rate.detach() for rate in rates))


class _Attempt(torch.autograd.Function):
    """A solve that gives NaN, and whose gradient is NaN, where it or its gradient's own solve comes to no end."""

    @staticmethod
    def forward(ctx, layer, start, end, reasons, x, context, *parameters):
        ctx.reasons, ctx.solved = reasons, None
        given = [None if one is None else one.detach().requires_grad_(one.requires_grad) for one in (x, context)]
        ctx.sources = [*given, *parameters]
        with torch.enable_grad():
            try:
                ctx.solved = layer._integrate(*given, start, end)
            except FloatingPointError as error:
                reasons.append(str(error))
                return x + math.nan, zero_log_det(x) + math.nan
        return tuple(one.detach() for one in ctx.solved)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        sources = [one for one in ctx.sources if one is not None and one.requires_grad]
        found = [torch.full_like(one, math.nan) for one in sources]
        if ctx.solved is not None:
            solved, pulls = zip(*[pair for pair in zip(ctx.solved, gradients) if pair[0].requires_grad])
            try:
                found = torch.autograd.grad(solved, sources, pulls, allow_unused=True)
            except FloatingPointError as error:
                ctx.reasons.append(str(error))
        each = iter(found)
        return (
            None,
            None,
            None,
            None,
            *[next(each) if one is not None and one.requires_grad else None for one in ctx.sources],
        )


class _Watch:
    """Ends an adaptive solve that will not end well; torchdiffeq calls it before each step."""

    def __init__(self, layer: Continuous):
        self.layer, self.steps = layer, 0

    def __call__(self, time: Tensor, state: tuple[Tensor, ...], step: Tensor) -> None:
        self.steps += 1
        if not all(part.isfinite().all() for part in state):
            reason = "a state that is not finite"
        elif not time + step > time:
            reason = "a step of no length: its dynamics are too steep, or not finite"
        elif self.steps > self.layer.max_steps:
            reason = f"no end in max_steps={self.layer.max_steps} steps"
        else:
            return
        raise FloatingPointError(
            f"an ODE ({self.layer.extra_repr()}) came to {reason}; larger rtol and atol, a fixed solver such as rk4, a"
            " smaller net or learning rate, or a penalty on its dynamics (kinetic, jacobian) may help"
        )


def _mean_error(state: tuple[Tensor, ...]) -> Tensor:
    """Of state and log-determinant, if any, the greater root mean square over the batch. A penalty needs no control."""
    return torch.stack([part.square().mean() for part in state[:2]]).max().sqrt()


def _greatest_error(state: tuple[Tensor, ...]) -> Tensor:
    """The greatest of any example's."""
    return torch.stack([part.reshape(len(part), -1).square().mean(1).max() for part in state[:2]]).max().sqrt()


def _sum(v: Tensor, many: bool) -> Tensor:
    """Over the event, and over probes where there are many: (B,)."""
    return sum_event(v.sum(0) if many else v)


def _rademacher(x: Tensor) -> Tensor:
    u = globalbatch.uniform(x.shape, device=x.device, dtype=x.dtype)
    return torch.where(u < 0.5, -torch.ones_like(u), torch.ones_like(u))


def _gaussian(x: Tensor) -> Tensor:
    u, v = globalbatch.uniform((len(x), 2, *x.shape[1:]), device=x.device, dtype=x.dtype).unbind(1)
    return (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)


_NOISE = {"rademacher": _rademacher, "gaussian": _gaussian}
