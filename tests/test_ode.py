"""Continuous-time layers: against closed forms, against themselves by other means, and where they cannot go on."""

import math
import time
from functools import partial

import pytest
import torch
from audit import event, randomize
from torch import nn

from flowtrain import flows
from flowtrain.bijections import Chain, Continuous
from flowtrain.bijections.ode import (
    ADAPTIVE,
    FIXED,
    continuous_layers,
    exact_trace,
    replace_unsolved_by_nan,
    states_only,
)
from flowtrain.flow import Flow
from flowtrain.nets import ConvODENet, ODENet
from flowtrain.runtime import global_batch

DOUBLE = torch.float64
exactly = partial(Continuous, rtol=1e-10, atol=1e-10)
net = partial(ODENet, hidden=8, depth=1)


class Linear(nn.Module):
    """dx/dt = A·x + b."""

    def __init__(self, shape, context_shape=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(*shape, *shape, generator=generator))
        self.bias = nn.Parameter(torch.randn(*shape, generator=generator))

    def forward(self, t, x, context=None):
        return x @ self.matrix.T + self.bias


class Growing(nn.Module):
    """dx/dt = (1 + 2·t)·x, so that x(T) = x·exp(T + T²)."""

    def __init__(self, shape, context_shape=None):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, t, x, context=None):
        return self.rate * (1 + 2 * t) * x


class Steep(nn.Module):
    """dx/dt = x² + 1, which is infinite in finite time."""

    def __init__(self, shape, context_shape=None):
        super().__init__()

    def forward(self, t, x, context=None):
        return x.square() + 1


def layer_of(net=net, shape=(3,), scale=0.5, **kwargs):
    torch.manual_seed(0)
    return randomize(exactly(shape, net, **kwargs), scale)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("time", [1.0, 0.3])
def test_a_linear_equation_has_its_closed_form(trace, time):
    """log p of x against that by the matrix exponential; of T·tr A, for diagonal A, both traces are exact."""
    flow = Flow((3,), partial(exactly, net=Linear, time=time, trace=trace)).double().eval()
    net = flow.bijection.net
    if trace == "hutchinson":
        net.matrix.data = net.matrix.data.diagonal().diag()
    x = torch.randn(5, 3, dtype=DOUBLE)
    a, b = net.matrix.detach(), net.bias.detach()
    augmented = torch.zeros(4, 4, dtype=DOUBLE)
    augmented[:3, :3], augmented[:3, 3] = a, b
    solution = torch.matrix_exp(time * augmented)
    z = x @ solution[:3, :3].T + solution[:3, 3]
    log_prob = -0.5 * z.square().sum(1) - 1.5 * math.log(2 * math.pi) + time * a.trace()
    torch.testing.assert_close(flow(x), log_prob, rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("learn_time", [False, True])
def test_time_enters_the_net_and_ends_at_t(learn_time):
    layer = exactly((2,), Growing, time=0.25, learn_time=learn_time).double().eval()
    x = torch.randn(4, 2, dtype=DOUBLE)
    z, log_det = layer(x)
    torch.testing.assert_close(z, x * math.exp(0.3125), rtol=1e-8, atol=0)
    torch.testing.assert_close(log_det, torch.full((4,), 0.625, dtype=DOUBLE), rtol=1e-8, atol=0)
    if learn_time:  # of 4 rows of 2 dimensions; d(T + T²)/d√T = (1 + 2T)·2√T
        log_det.sum().backward()
        assert math.isclose(layer.sqrt_time.grad.item(), 4 * 2 * 1.5, rel_tol=1e-7)


@pytest.mark.parametrize("solver", [*ADAPTIVE, *FIXED])
def test_every_solver_solves(solver):
    layer = Continuous((2,), Growing, solver=solver, steps=200, rtol=1e-4, atol=1e-4, max_steps=5000).double().eval()
    x = torch.rand(4, 2, dtype=DOUBLE) + 0.5
    with torch.no_grad():
        z, log_det = layer(x)
        back, _ = layer.inverse(z)
    close = 4e-2 if solver == "euler" else 1e-3
    torch.testing.assert_close(z, x * math.exp(2), rtol=close, atol=0)
    torch.testing.assert_close(log_det, torch.full((4,), 4.0, dtype=DOUBLE), rtol=close, atol=0)
    torch.testing.assert_close(back, x, rtol=close, atol=0)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_hutchinsons_trace_is_unbiased(noise, kind):
    """Its mean over many draws lies within four standard errors of the exact trace, whose spread it has not."""
    shape, net_ = ((4,), net) if kind == "vector" else ((1, 2, 2), partial(ConvODENet, hidden=3, depth=1))
    layer = layer_of(net_, shape, noise=noise)
    x = event(layer, 1).expand(2000, *shape)
    with torch.no_grad():
        estimates = layer(x)[1]
        with exact_trace():
            exact = layer(x[:1])[1]
    error = estimates.std() / math.sqrt(len(x))
    assert estimates.std() > 0.05
    assert (estimates.mean() - exact).abs() < 4 * error


def test_gaussian_noise_is_standard_normal():
    from flowtrain.bijections.ode import _gaussian

    draws = _gaussian(torch.empty(40000, 2, dtype=DOUBLE))
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(draws.pow(power).mean() - moment) < 4 * math.sqrt(spread / draws.numel())


def test_noise_is_drawn_once_a_solve(monkeypatch):
    """And is the same for any number of processes."""
    drawn = []
    uniform = global_batch.uniform
    monkeypatch.setattr(global_batch, "uniform", lambda *args, **kwargs: drawn.append(args) or uniform(*args, **kwargs))
    layer = layer_of().train()
    x = event(layer, 6)
    torch.manual_seed(4)
    z, log_det = layer(x)
    (z.sum() + log_det.sum()).backward()
    assert len(drawn) == 1 and layer.evaluations > 20
    torch.manual_seed(4)
    with global_batch.rows(4, 6):
        torch.testing.assert_close(layer(x[4:])[1], log_det[4:], rtol=0, atol=1e-7)


def gradients(layer, x, context, weights):
    torch.manual_seed(5)
    sources = [x, context, *layer.parameters()]
    z, log_det = layer(x, 2 * context)
    return torch.autograd.grad((z * weights[0]).sum() + (log_det * weights[1]).sum(), sources), log_det


@pytest.mark.parametrize("options", [{}, {"trace": "exact"}, {"kinetic": 0.1, "jacobian": 0.2}], ids=str)
def test_the_adjoint_gives_the_gradient_of_the_steps(options):
    """Of input, context, weights and end time, in float64."""
    layer = layer_of(context_shape=(2,), learn_time=True, **options).train()
    x, context = event(layer).requires_grad_(), torch.randn(3, 2, dtype=DOUBLE).requires_grad_()
    weights = torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    adjoint, log_det = gradients(layer, x, context, weights)
    layer.adjoint = False
    direct, same = gradients(layer, x, context, weights)
    torch.testing.assert_close(log_det, same)
    for one, other in zip(adjoint, direct):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("name", ["kinetic", "jacobian"])
def test_a_penalty_changes_the_gradient_and_not_the_value(name, adjoint):
    """The gradient of log-det becomes that of log-det less the penalty, computed here by quadrature on the path."""
    layer = layer_of(solver="rk4", steps=16, trace="exact", adjoint=adjoint, time=0.7).train()
    x = event(layer)
    plain = layer(x)[1]
    (before,) = torch.autograd.grad(plain.sum(), layer.net.layers[0].linear.weight)
    setattr(layer, name, 0.3)
    penalized = layer(x)[1]
    assert torch.equal(penalized, plain)
    (after,) = torch.autograd.grad(penalized.sum(), layer.net.layers[0].linear.weight)
    penalty = penalty_by_quadrature(layer, name, x)
    (expected,) = torch.autograd.grad(penalty, layer.net.layers[0].linear.weight)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(before - after, 0.3 * expected, rtol=1e-3, atol=1e-5)
    layer.eval()
    assert torch.equal(torch.autograd.grad(layer(x)[1].sum(), layer.net.layers[0].linear.weight)[0], before)


def penalty_by_quadrature(layer, name, x, n=100):
    """∫|f|² dt or ∫|∂f/∂x|² dt by the midpoint rule along the path, summed over the batch."""
    total, step = 0.0, layer.time / n
    for i in range(n):
        t = torch.tensor(i * step, dtype=DOUBLE)
        start = layer.net(t, x)
        middle = x + 0.5 * step * start
        velocity = layer.net(t + 0.5 * step, middle)
        if name == "kinetic":
            total = total + step * velocity.square().sum()
        else:
            one = lambda row, t=t: layer.net(t + 0.5 * step, row[None])[0]
            total = total + step * torch.func.vmap(torch.func.jacrev(one))(middle).square().sum()
        x = x + step * velocity
    return total


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_what_is_not_finite_ends_in_an_error_at_once(bad, direction, adjoint):
    layer = Continuous((2,), net, adjoint=adjoint)
    x = torch.zeros(3, 2)
    x[1, 1] = bad
    begin = time.monotonic()
    with pytest.raises(FloatingPointError, match="not finite"):
        getattr(layer, direction)(x)
    assert time.monotonic() - begin < 2


def test_a_gradient_that_is_not_finite_ends_in_an_error_too():
    layer = Continuous((2,), net, adjoint=True)
    z, _ = layer(torch.zeros(3, 2))
    with pytest.raises(FloatingPointError, match="not finite"):
        (z * math.nan).sum().backward()


def test_a_fixed_solver_hands_on_what_is_not_finite():
    z, log_det = Continuous((2,), net, solver="rk4")(torch.full((3, 2), math.nan))
    assert z.isnan().all() and log_det.shape == (3,)


def test_an_equation_without_a_solution_ends_in_an_error():
    layer = Continuous((2,), Steep, time=4.0, adjoint=False)
    begin = time.monotonic()
    with pytest.raises(FloatingPointError, match="rk4"):
        layer(torch.ones(3, 2))
    assert time.monotonic() - begin < 5


def test_max_steps_bounds_a_solve_and_its_gradient():
    layer = layer_of(max_steps=3)
    with pytest.raises(FloatingPointError, match="max_steps=3"):
        layer(event(layer))
    layer.max_steps = 100
    z, _ = layer(event(layer))
    layer.max_steps = 3
    with pytest.raises(FloatingPointError, match="max_steps=3"):
        z.sum().backward()


def test_evaluations_are_counted_those_of_the_adjoint_too():
    layer = Continuous((2,), net, solver="rk4", steps=5)
    z, _ = layer(torch.randn(3, 2))
    assert layer.statistics() == {"ode/evaluations": 20}
    z.sum().backward()
    assert layer.statistics() == {"ode/evaluations": 40}
    layer.inverse(torch.randn(3, 2))
    assert layer.statistics() == {"ode/evaluations": 20}
    assert type(layer.evaluations) is int


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_one_evaluation_of_the_net_serves_state_and_trace(solver):
    layer, calls = Continuous((2,), net, solver=solver), []
    layer.net.register_forward_pre_hook(lambda *_: calls.append(1))
    layer(torch.randn(3, 2))
    assert len(calls) == layer.evaluations > 0


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_sampling_and_encoding_compute_no_trace(solver, trace, monkeypatch):
    layer = partial(Continuous, net=net, solver=solver, trace=trace, rtol=1e-6, atol=1e-6)
    flow = randomize(Flow((3,), partial(Chain, layers={"ode": layer}))).float().eval()
    x, pulls, grad = torch.randn(5, 3), [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pulls.append(1) or grad(*args, **kwargs))
    with torch.no_grad():
        expected, _ = flow.bijection(x)
    assert pulls
    pulls.clear()
    z = flow.encode(x)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flow.decode(z), x, atol=1e-4, rtol=1e-4)
    assert not pulls and flow.bijection.ode.evaluations
    with states_only():
        assert flow.bijection(x)[1].isnan().all()  # none is not zero
    assert flow.bijection(x)[1].isfinite().all()


def everything(layer, x):
    """The gradients of the layer's input and parameters."""
    layer.zero_grad()
    x = x.requires_grad_()
    torch.manual_seed(1)
    z, log_det = layer(x)
    x.grad = None
    (z.square().sum() + log_det.sum()).backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("options", [{}, {"learn_time": True}, {"kinetic": 0.1, "jacobian": 0.2}], ids=str)
def test_where_it_can_be_solved_a_lenient_solve_is_the_same(adjoint, options):
    layer = layer_of(adjoint=adjoint, **options)
    x = event(layer)
    expected = everything(layer, x)
    with replace_unsolved_by_nan() as reasons:
        assert all(map(torch.equal, everything(layer, x), expected))
    assert reasons == []


@pytest.mark.parametrize("adjoint", [False, True])
def test_what_cannot_be_solved_is_nan_where_that_is_wanted(adjoint):
    layer = layer_of(adjoint=adjoint, max_steps=3)
    with replace_unsolved_by_nan() as reasons:
        found = everything(layer, event(layer))
    assert all(one.isnan().all() for one in found)
    assert len(reasons) == 1 and "max_steps=3" in reasons[0]
    with pytest.raises(FloatingPointError):
        layer(event(layer))


def test_a_gradient_that_cannot_be_solved_is_nan_where_that_is_wanted():
    layer = layer_of(max_steps=100)
    with replace_unsolved_by_nan() as reasons:
        z, _ = layer(event(layer).requires_grad_())
        layer.max_steps = 3
        z.sum().backward()
    assert z.isfinite().all() and len(reasons) == 1
    assert all(parameter.grad.isnan().all() for parameter in layer.parameters())


def test_in_evaluation_no_example_has_more_than_its_share_of_the_error():
    """One example in 500 moves fast: a mean over the batch would not see it."""

    class Fast(Growing):
        def forward(self, t, x, context=None):
            return x.square() * x.sign()

    layer = Continuous((1,), Fast, rtol=1e-4, atol=1e-4).double()
    x = torch.full((500, 1), 1e-3, dtype=DOUBLE)
    x[7] = 0.95
    errors = []
    for mode in (False, True):
        with torch.no_grad():
            z, _ = layer.train(mode)(x)
        errors.append((z / (x / (1 - x)) - 1).abs().max().item())
    assert errors[0] < 1e-3 < errors[1]


def test_the_training_solver_is_of_training_alone():
    layer = layer_of(solver="dopri5", train_solver="rk4", steps=2).train()
    x = event(layer)
    layer(x)
    assert layer.evaluations == 8
    layer.eval()
    layer(x)
    assert layer.evaluations > 20


def test_the_training_tolerance_is_of_training_alone():
    layer = layer_of()
    x, counts = event(layer), []
    for mode, tolerance in ((True, None), (True, 1e-3), (False, 1e-3)):
        layer.train(mode).train_tolerance = tolerance
        layer(x)
        counts.append(layer.evaluations)
    assert counts[0] > 2 * counts[1] and counts[2] > 2 * counts[1]


def test_only_the_context_manager_or_the_argument_makes_a_trace_exact():
    layer, argued = layer_of(), layer_of(trace="exact")
    x = event(layer)
    with exact_trace():
        exact = layer(x)[1]
    torch.testing.assert_close(argued.train()(x)[1], exact)
    for mode in (True, False):
        assert (layer.train(mode)(x)[1] - exact).abs().max() > 1e-3


def test_an_exact_trace_of_many_dimensions_is_cut_into_parts(monkeypatch):
    layer = layer_of(shape=(5,))
    x = event(layer, 7)
    with torch.no_grad(), exact_trace():
        whole = layer(x)[1]
        monkeypatch.setattr("flowtrain.bijections.ode._ROWS_AT_ONCE", 16)
        torch.testing.assert_close(layer(x)[1], whole)


def test_nothing_of_it_is_in_low_precision():
    """bfloat16 input comes out in float32, and under autocast the net computes as without it."""
    layer = Continuous((3,), net, trace="exact").eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(4, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = layer(x)
        (z.sum() + log_det.sum()).backward()
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close((z, log_det), layer(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_a_new_layer_is_the_identity(solver):
    for shape, kind in (((3,), ODENet), ((2, 4, 4), ConvODENet)):
        for layer in ("concat", "concatsquash"):
            made = Continuous(shape, partial(kind, hidden=4, layer=layer), solver=solver)
            x = torch.randn(2, *shape)
            z, log_det = made(x)
            torch.testing.assert_close(z, x)
            torch.testing.assert_close(log_det, torch.zeros(2))


def test_a_density_in_the_plane_integrates_to_one():
    torch.manual_seed(0)
    flow = Flow((2,), partial(Chain, layers={"a": partial(exactly, net=net), "b": partial(exactly, net=net)}))
    for layer in continuous_layers(flow):
        layer.rtol = layer.atol = 1e-5
    randomize(flow, 0.5)
    side = torch.linspace(-9, 9, 181, dtype=DOUBLE)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad(), exact_trace():
        density = torch.cat([flow(part) for part in grid.split(8192)]).exp()
        moved = (flow.bijection(grid[:100])[0] - grid[:100]).abs().max()
    assert moved > 0.3
    assert abs(density.sum().item() * (side[1] - side[0]).item() ** 2 - 1) < 1e-3


@pytest.mark.parametrize(
    "name, value",
    [
        ("solver", "dopri6"),
        ("train_solver", "scipy_solver"),
        ("trace", "none"),
        ("noise", "uniform"),
        ("time", 0.0),
        ("rtol", -1.0),
        ("atol", math.inf),
        ("train_tolerance", 0.0),
        ("steps", 0),
        ("max_steps", 0),
        ("kinetic", -0.1),
        ("jacobian", -1.0),
    ],
)
def test_what_a_layer_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        Continuous((2,), net, **{name: value})


@pytest.mark.parametrize(
    "make, match",
    [
        (partial(ODENet, (1, 4, 4)), "flatten"),
        (partial(ConvODENet, (4,)), "images"),
        (partial(ODENet, (4,), layer="squash"), "layer='squash'"),
        (partial(ConvODENet, (1, 4, 4), activation="relu"), "activation='relu'"),
        (partial(ODENet, (4,), depth=0), "depth=0"),
        (partial(ODENet, (4,), context_shape=(1, 2, 2)), "context vector"),
    ],
)
def test_what_a_net_cannot_be_is_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "make, sizes",
    [
        (partial(flows.ffjord, (2,), blocks=2), [2, 2]),
        (partial(flows.hybrid, (2,), hidden=8), [2]),
        (partial(flows.ffjord_image, (1, 8, 8), hidden=3, depth=1), [64, 64, 32]),
        (partial(flows.hybrid_image, (1, 8, 8), hidden=4), [32]),
        (partial(flows.glow, (1, 8, 8)), []),
    ],
    ids=lambda value: getattr(getattr(value, "func", None), "__name__", ""),
)
def test_whole_models_invert_and_their_equations_are_found(make, sizes):
    """Whatever is before the first equation, the log-determinants of both ways cancel."""
    flow = make()
    assert [math.prod(layer.shape) for layer in continuous_layers(flow)] == sizes
    bijection = randomize(flow.bijection, 0.05)
    for layer in continuous_layers(flow):
        layer.rtol = layer.atol = 1e-9
    x = 0.5 * torch.randn(2, *flow.shape, dtype=DOUBLE)
    with torch.no_grad(), exact_trace():
        z, log_det = bijection(x)
        back, inverse_log_det = bijection.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, -inverse_log_det, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_computes_the_same():
    """Outside the graph: the number of a solver's steps depends on values."""
    layer = layer_of(trace="exact", adjoint=False).float()
    x = event(layer, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, layer(x), rtol=0, atol=0)
    compiled[1].sum().backward()
