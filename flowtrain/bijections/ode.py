"""Continuous-time flows: an ordinary differential equation as a layer (Grathwohl et al. 2019, FFJORD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowtrain.bijections.bijection import Bijection, at_least_float32, full_precision, size, sum_event, zero_log_det
from flowtrain.bijections.row_solver import solve_rows
from flowtrain.runtime import global_batch, modes

EXACT_LIMIT = 64  # dimensions up to which an evaluation should enter exact_trace: it costs a gradient for each of them
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")  # fehlberg2 misses its tolerance by a factor of 200
FIXED = ("rk4", "heun3", "midpoint", "euler")

_ROWS_AT_ONCE = 4096  # of an exact trace's gradients side by side, examples × dimensions: bounds its memory


def exact_trace() -> AbstractContextManager[None]:
    """Within it, every traced layer computes its log-determinant from exact traces, whatever its ``trace``.

    Gradients of an ODE, if any, go through the solver's steps: they are exact for what was computed.
    """
    return modes.using(exact_trace=True)


def states_only() -> AbstractContextManager[None]:
    """Within it, no traced layer computes a trace: its log-determinant is NaN and costs nothing."""
    return modes.using(states_only=True)


def accuracy(tolerance: float, step_factor: int = 1) -> AbstractContextManager[None]:
    """Within it, adaptive solvers of :class:`Continuous` layers have ``tolerance``, and fixed ones take ``step_factor``
    times as many steps as they say."""
    return modes.using(tolerance=tolerance, step_factor=step_factor)


@contextmanager
def several_probes(number: int) -> Iterator[list[Tensor]]:
    """Within it, a stochastic trace is the mean over ``number`` noises; yields a list, to which each traced layer
    appends the variance, for each example, that its log-determinant has from them, (B,)."""
    spreads: list[Tensor] = []
    with modes.using(probes=number, spreads=spreads):
        yield spreads


def replace_solutions(by: Callable[[Continuous, Tensor, Tensor | None], Tensor]) -> AbstractContextManager[None]:
    """Within it, no ODE is solved: a :class:`Continuous` layer returns ``by(layer, x, context)``, and 0 for its
    log-determinant."""
    return modes.using(equations=by)


@contextmanager
def replace_unsolved_by_nan() -> Iterator[list[str]]:
    """Within it, NaN replaces a solution or gradient that would raise FloatingPointError; yields a list of the reasons.

    If one of several processes raised, the others would wait for its gradients. So all go on, and find together that
    the step is bad.
    """
    reasons: list[str] = []
    with modes.using(unsolved=reasons):
        yield reasons


def continuous_layers(module: nn.Module) -> list[Continuous]:
    """The continuous-time layers of a flow."""
    return [layer for layer in module.modules() if isinstance(layer, Continuous)]


def traced_layers(module: nn.Module) -> list[Bijection]:
    """The layers whose log-determinants come from traces, exact or estimated."""
    return [layer for layer in module.modules() if isinstance(layer, Bijection) and layer.traced]


def needs_exact_trace(module: nn.Module) -> bool:
    """Whether a flow has traced layers, all of so few dimensions that it should be evaluated within
    :func:`exact_trace`."""
    layers = traced_layers(module)
    return bool(layers) and all(size(layer.shape) <= EXACT_LIMIT for layer in layers)


class Continuous(Bijection):
    """z = x(T) of dx/dt = f(t, x), x(0) = x, with log-determinant ∫ tr ∂f/∂x dt (Grathwohl et al. 2019, eq. 4).

    The trace is estimated as εᵀ(∂f/∂x)ε with one ε for each example and solve (eq. 8): unbiased for the
    log-determinant, in training and evaluation. Within :func:`exact_trace` or with ``trace="exact"`` it is exact, at
    the cost of a gradient for each dimension. State and trace come from one evaluation of the net for each stage of the
    solver.

    In evaluation each row has adaptive steps of its own, so that its result depends on the rest of the batch by
    roundings alone. (With ``adjoint`` that holds for results without gradients.) The net then gets a time for each row.

    The net computes in float32 or float64, under autocast too: an adaptive solver would spend its steps on the
    roundings of bfloat16.

    Args:
        shape: of one event.
        net: factory ``net(shape=…, context_shape=…)`` of f, called as ``f(t, x, context)`` with a time t that is one
            number, or (B, 1, …), one for each row with as many axes as x.
        time: T, or its start value if ``learn_time``.
        learn_time: T is a parameter.
        solver: of torchdiffeq: adaptive (dopri5, dopri8, bosh3, adaptive_heun) with tolerances ``rtol`` and ``atol``,
            or fixed (rk4, heun3, midpoint, euler) with ``steps`` equal steps. The tolerances bound the root mean square
            over the batch in training, and of each example in evaluation. ``rtol`` is at least 8 roundings of the
            state's precision.
        train_solver, train_tolerance: another solver, and another value of both tolerances, for training mode.
            Evaluation and sampling still solve the ODE itself. (Training exploits the errors of few fixed steps, unless
            a penalty keeps the ODE easy.)
        adjoint: gradients by a second solve backwards in time, in constant memory (Chen et al. 2018), with the error
            control of Kidger et al. 2021; else through the solver's steps, faster and exact for what they computed.
        trace: "hutchinson" or "exact".
        noise: distribution of ε: "rademacher" or "gaussian".
        kinetic, jacobian: weights, in nats, of the penalties ∫|f|² dt and ∫|∂f/∂x|² dt, the latter estimated as
            |εᵀ∂f/∂x|² where the trace is (Finlay et al. 2020). In training they change the gradient of
            the log-determinant and not its value, so that a training loss can be compared with one without them.
        max_steps: of an adaptive solver, in each direction.
        context_shape: of a context that the net reads too, or None.

    Raises:
        ValueError: an argument outside its range.
        FloatingPointError: in ``forward``, ``inverse`` or their gradient, where an adaptive solver cannot go on. A
            fixed one returns numbers that are not finite.

    >>> from flowtrain import bijections as b, nets
    >>> b.Continuous((2,), nets.ODENet, solver="rk4")(torch.randn(5, 2))[0].shape
    torch.Size([5, 2])
    """

    traced = True

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
        for name, choice, options in (
            ("solver", solver, (*ADAPTIVE, *FIXED)),
            ("train_solver", train_solver, (*ADAPTIVE, *FIXED)),
            ("trace", trace, ("hutchinson", "exact")),
            ("noise", noise, tuple(NOISE)),
        ):
            if choice not in options:
                raise ValueError(f"{name}='{choice}' must be one of {', '.join(options)}")
        self.time, self.solver, self.train_solver = time, solver, train_solver
        self.rtol, self.atol, self.train_tolerance = rtol, atol, train_tolerance
        self.steps, self.max_steps = steps, max_steps
        self.adjoint, self.trace, self.noise = adjoint, trace, noise
        self.kinetic, self.jacobian = kinetic, jacobian
        # its square is T, so that T stays positive
        self.sqrt_time = nn.Parameter(torch.tensor(math.sqrt(time))) if learn_time else None
        self.net = net(shape=self.shape, context_shape=context_shape)
        self.evaluations = 0  # of the net by the last forward or inverse, and by the second solve of its gradient

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
        if torch.compiler.is_compiling():  # the number of steps depends on values: no graph
            return torch.compiler.disable(Continuous._solve)(self, x, context, start, end)
        self.evaluations = 0
        x = x.to(at_least_float32(x.dtype))
        if (stand_in := modes.current().equations) is not None:
            return stand_in(self, x, context), zero_log_det(x)
        if modes.current().tracing:
            return self._integrate_in_steps(x, context, start, end)
        if not len(x):  # no mean error to control
            return x, zero_log_det(x)
        reasons = modes.current().unsolved
        if reasons is None or not torch.is_grad_enabled():
            return self._integrate(x, context, start, end)
        return _LenientSolve.apply(self, start, end, reasons, x, context, *self.parameters())

    def _integrate(self, x, context, start, end):
        mode, differentiable = modes.current(), torch.is_grad_enabled()
        method = self.train_solver if self.training else self.solver
        rtol, atol = self.rtol, self.atol
        if self.training and self.train_tolerance:
            rtol = atol = self.train_tolerance
        if mode.tolerance:
            rtol = atol = mode.tolerance
        rtol = max(rtol, 8 * torch.finfo(x.dtype).eps)
        penalized = self.training and differentiable and (self.kinetic > 0 or self.jacobian > 0)
        field = _Velocity(self, context) if mode.states_only else _Rates(self, x, context, penalized)
        state = (x,) if mode.states_only else (x, field.zero, *[zero_log_det(x)] * penalized)
        by_adjoint = self.adjoint and differentiable and not mode.exact_trace
        if self.training or method in FIXED or by_adjoint:
            state = self._solve_together(field, state, start, end, method, rtol, atol, by_adjoint)
        else:
            atol = max(atol, torch.finfo(x.dtype).eps)
            state = solve_rows(field, state, start, end, method, rtol, atol, _StepLimit(self))
        z, *integrals = state
        if mode.states_only:
            return z, zero_log_det(x) + math.nan
        with full_precision(x):
            log_det, *penalty = integrals
            for one in penalty:
                one = one * (end - start)
                log_det = log_det - (one - one.detach())
            if log_det.dim() > 1:  # an estimate for each noise
                if mode.spreads is not None:
                    mode.spreads.append(log_det.detach().var(1) / mode.probes)
                log_det = log_det.mean(1)
            return z, log_det

    def _solve_together(self, field, state, start, end, method, rtol, atol, by_adjoint):
        """The state at ``end`` by torchdiffeq, whose steps are the same for all rows."""
        from torchdiffeq import odeint, odeint_adjoint  # brings all of scipy

        times = torch.tensor([start, end], device=state[0].device, dtype=state[0].dtype)
        if method in FIXED:
            options = adjoint_options = {"grid_constructor": self._grid}
        else:  # a step ends at the end: torchdiffeq would step over it and interpolate, at a lower order
            options, adjoint_options = {"step_t": times[1:]}, {"step_t": times[:1]}
            field.callback_step, field.callback_step_adjoint = _StepLimit(self), _StepLimit(self)
        solve = odeint
        if by_adjoint:
            sources = [*self.parameters(), *([] if field.context is None else [field.context])]
            solve = partial(
                odeint_adjoint, adjoint_params=sources, adjoint_options=adjoint_options | {"norm": "seminorm"}
            )
        norm = _mean_error if self.training else _greatest_error
        solution = solve(field, state, times, rtol=rtol, atol=atol, method=method, options=options | {"norm": norm})
        return tuple(part[-1] for part in solution)

    def _integrate_in_steps(self, x, context, start, end):
        """What torchdiffeq's solvers of fixed steps compute, without their reads of the times."""
        if self.solver in ADAPTIVE:
            raise ValueError(f"{self.solver} takes as many steps as the data need, which no program can record")
        states_only = modes.current().states_only
        field = _Velocity(self, context) if states_only else _Rates(self, x, context, penalized=False)
        state = (x,) if states_only else (x, zero_log_det(x))
        steps = self.steps * modes.current().step_factor
        step = (end - start) / steps
        for i in range(steps):
            time = start + i * step
            slopes: list[tuple[Tensor, ...]] = []
            for share, weights in _STAGES[self.solver]:
                at = _move(state, slopes, weights, step)
                if share is None:
                    state = at
                else:
                    slopes.append(field(torch.tensor(time + share * step, device=x.device, dtype=x.dtype), at))
        return (state[0], zero_log_det(x) + math.nan) if states_only else state

    def _grid(self, field, state, times):
        steps = self.steps * modes.current().step_factor
        share = torch.linspace(0, 1, steps + 1, device=times.device, dtype=times.dtype)
        return times[0] + (times[-1] - times[0]) * share


# of each solver of fixed steps: the share of the step at which a slope is taken, and the weights of the slopes before
# it in the state there; at last, without a share, those of the step. rk4 is Kutta's 3/8 rule, as in torchdiffeq.
_STAGES: dict[str, list[tuple[float | None, tuple[float, ...]]]] = {
    "euler": [(0, ()), (None, (1,))],
    "midpoint": [(0, ()), (1 / 2, (1 / 2,)), (None, (0, 1))],
    "heun3": [(0, ()), (1 / 3, (1 / 3,)), (2 / 3, (0, 2 / 3)), (None, (1 / 4, 0, 3 / 4))],
    "rk4": [
        (0, ()),
        (1 / 3, (1 / 3,)),
        (2 / 3, (-1 / 3, 1)),
        (1, (1, -1, 1)),
        (None, (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
    ],
}


def _move(state: tuple[Tensor, ...], slopes, weights, step: float) -> tuple[Tensor, ...]:
    """The state moved by the step along the weighted slopes."""
    for weight, slope in zip(weights, slopes):
        state = tuple(part + (step * weight) * rate for part, rate in zip(state, slope))
    return state


class _Velocity:
    """The right-hand side of one solve, for the state alone.

    Time runs from 0 to 1, and the velocity is T times the net's, so that T gets its gradient through the velocity.
    """

    callback_step: _StepLimit
    callback_step_adjoint: _StepLimit

    def __init__(self, layer: Continuous, context: Tensor | None):
        self.layer, self.context = layer, context
        self.modes = modes.current()  # the solve of the gradient may run in another thread

    def __call__(self, time: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with full_precision(state[0]):
            return (self.at(time, state[0]),)

    def at(self, time: Tensor, x: Tensor) -> Tensor:
        self.layer.evaluations += 1
        end_time = self.layer.end_time
        with modes.enter(self.modes):
            return end_time * self.layer.net(end_time * time, x, self.context)


class _Rates(_Velocity):
    """The right-hand side for the state, the log-determinant and, where ``penalized``, the penalty, from one velocity.
    The noise is the same during a solve. With several noises there are as many log-determinants, (B, noises).

    Attributes:
        zero: the log-determinants at the start.
    """

    def __init__(self, layer: Continuous, x: Tensor, context: Tensor | None, penalized: bool):
        super().__init__(layer, context)
        self.penalized, self.zero, self.many_traces = penalized, zero_log_det(x), False
        if modes.current().exact_trace or layer.trace == "exact":
            if modes.current().tracing:  # one after the other, in a program for a batch of any size
                directions = torch.eye(x[0].numel(), device=x.device, dtype=x.dtype)
                self.probes = [direction.view(x.shape[1:]).expand_as(x) for direction in directions]
                return
            self.probes = rows_of_trace(x)
            return
        noises = [NOISE[layer.noise](x) for _ in range(modes.current().probes)]
        self.probes = noises
        if len(noises) > 1:
            self.probes, self.many_traces = [torch.stack(noises)], True
            self.zero = self.zero[:, None].expand(-1, len(noises))

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
                trace = trace + (
                    (pulled * probe).flatten(2).sum(2).T if self.many_traces else _sum(pulled * probe, many)
                )
                if self.penalized:
                    norm = norm + _sum(pulled.square(), many)
            rates = [velocity, trace]
            if self.penalized:
                energy = layer.kinetic * sum_event(velocity.square()) + layer.jacobian * norm
                rates.append(energy / layer.end_time)
        return tuple(rates if differentiable else (rate.detach() for rate in rates))


class _LenientSolve(torch.autograd.Function):
    """A solve that returns NaN with NaN as its gradient, where it or the second solve of its gradient fails."""

    @staticmethod
    def forward(ctx, layer, start, end, reasons, x, context, *parameters):
        ctx.reasons, ctx.solved = reasons, None
        inputs = [None if one is None else one.detach().requires_grad_(one.requires_grad) for one in (x, context)]
        ctx.sources = [*inputs, *parameters]
        with torch.enable_grad():
            try:
                ctx.solved = layer._integrate(*inputs, start, end)
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


class _StepLimit:
    """Ends an adaptive solve that cannot succeed; torchdiffeq calls it before each step."""

    def __init__(self, layer: Continuous):
        self.layer, self.steps = layer, 0

    def __call__(self, time: Tensor, state: tuple[Tensor, ...], step: Tensor) -> None:
        self.steps += 1
        if not all(part.isfinite().all() for part in state):
            reason = "a state that is not finite"
        elif not (time + step > time).all():
            reason = "step-size underflow: its dynamics are too steep, or not finite"
        elif self.steps > self.layer.max_steps:
            reason = f"its limit of max_steps={self.layer.max_steps} steps"
        else:
            return
        raise FloatingPointError(
            f"an ODE ({self.layer.extra_repr()}) came to {reason}; larger rtol and atol, a fixed solver such as rk4, a"
            " smaller net or learning rate, or a penalty on its dynamics (kinetic, jacobian) may help"
        )


def _mean_error(state: tuple[Tensor, ...]) -> Tensor:
    """The greater of the root mean squares, over the batch, of state and log-determinant, if any. A penalty needs no
    error control."""
    return torch.stack([part.square().mean() for part in state[:2]]).max().sqrt()


def _greatest_error(state: tuple[Tensor, ...]) -> Tensor:
    """The greatest root mean square of any example."""
    return torch.stack([part.reshape(len(part), -1).square().mean(1).max() for part in state[:2]]).max().sqrt()


def rows_of_trace(x: Tensor) -> list[Tensor]:
    """The unit vectors of the events of a batch, in parts that bound the memory of gradients side by side: each (n,
    *x.shape)."""
    parts = torch.eye(x[0].numel(), device=x.device, dtype=x.dtype).split(max(1, _ROWS_AT_ONCE // len(x)))
    return [part.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape) for part in parts]


def _sum(v: Tensor, many: bool) -> Tensor:
    """Over the event, and over probes where there are many: (B,)."""
    return sum_event(v.sum(0) if many else v)


def _rademacher(x: Tensor) -> Tensor:
    u = global_batch.uniform(x.shape, device=x.device, dtype=x.dtype)
    return torch.where(u < 0.5, -torch.ones_like(u), torch.ones_like(u))


def _gaussian(x: Tensor) -> Tensor:
    u, v = global_batch.uniform((len(x), 2, *x.shape[1:]), device=x.device, dtype=x.dtype).unbind(1)
    return (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)


NOISE = {"rademacher": _rademacher, "gaussian": _gaussian}
