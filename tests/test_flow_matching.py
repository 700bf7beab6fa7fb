"""Flow matching: what it learns, which flows it takes, and that the likelihoods it leads to can be trusted."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from audit import randomize
from composed import configuration
from inprocess import flowtrain

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.bijections.ode import ADAPTIVE, accuracy, exact_trace, several_probes
from flowtrain.commands.solver_error import evaluate_to_its_error
from flowtrain.engine.evaluate import summarize
from flowtrain.engine.jacobian import log_abs_det
from flowtrain.engine.objectives import FlowMatching
from flowtrain.engine.objectives.flow_matching import at_first_equation, nearest
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch

DOUBLE = torch.float64
exactly = partial(b.Continuous, solver="dopri8", rtol=1e-7, atol=1e-7, adjoint=False)
TINY = {
    "cnf": partial(flows.cnf, (3,), hidden=6, depth=1, ode=exactly),
    "cnf, radial": partial(flows.cnf, (3,), hidden=6, depth=1, radial=True, ode=exactly),
    "cnf, filters": partial(flows.cnf, (3,), hidden=6, depth=1, filters=5, ode=exactly),
    "cnf_image": partial(flows.cnf_image, (1, 2, 2), hidden=4, ode=exactly),
    "ffjord": partial(flows.ffjord, (3,), blocks=2, hidden=6, depth=1, ode=exactly),
    "ffjord_image": partial(flows.ffjord_image, (1, 4, 4), levels=2, hidden=3, depth=1, ode=exactly),
}


def started(name, scale=0.1):
    torch.manual_seed(0)
    flow = TINY[name]()
    flow.initialize(torch.randn(200, *flow.shape) * torch.rand(200, *[1] * len(flow.shape)))
    for layer in flow.modules():
        if isinstance(layer, b.Continuous):
            randomize(layer, scale)
    return flow.double().eval()


class Gaussian(torch.nn.Module):
    """The exact velocity from a Gaussian at time 0, of independent dimensions in a turned frame, to N(0, 1) at 1."""

    def __init__(self, shape, context_shape=None):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.linspace(-1, 1, shape[0]))
        self.log_deviation = torch.nn.Parameter(torch.linspace(-1.5, 0.5, shape[0]))
        numbers = torch.randn(*shape, *shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("frame", torch.linalg.qr(numbers)[0])

    def forward(self, t, x, context=None):
        variance = self.log_deviation.exp().square()
        total = (1 - t) ** 2 * variance + t**2
        y = (t - (1 - t) * variance) / total * (x @ self.frame - (1 - t) * self.mean) - self.mean
        return y @ self.frame.T

    def sample(self, noise):
        return (self.mean + self.log_deviation.exp() * noise) @ self.frame.T

    def log_prob(self, x):
        return torch.distributions.Normal(self.mean, self.log_deviation.exp()).log_prob(x @ self.frame).sum(1)


def gaussian_flow(dims, trace="hutchinson", **options):
    return Flow((dims,), partial(b.Chain, layers={"ode": partial(b.Continuous, net=Gaussian, trace=trace, **options)}))


# ---- what is learned


@pytest.mark.parametrize("times", ["uniform", "likelihood"])
def test_no_velocity_has_less_loss_than_that_of_the_true_density(times):
    """Its gradient at the exact velocity is zero within its noise, and a step away the loss is larger."""
    flow, objective = gaussian_flow(2), FlowMatching(times=times)
    net, losses = flow.bijection.ode.net, []
    with torch.no_grad():
        x = net.sample(torch.randn(20_000, 2))
        for step in (-0.15, 0.0, 0.15):
            net.log_deviation += step
            torch.manual_seed(1)
            losses.append(objective.loss(flow, (x, None)).mean().item())
            net.log_deviation -= step
    assert losses[1] < min(losses[0], losses[2])


def test_the_loss_is_that_of_the_definition():
    flow, objective = gaussian_flow(3), FlowMatching(times="uniform")
    x = torch.randn(6, 3)
    torch.manual_seed(2)
    losses = objective.loss(flow, (x, None))
    torch.manual_seed(2)
    noise, t = flow.base.sample(6), global_batch.stratified(6)[:, None]
    difference = flow.bijection.ode.net(t, (1 - t) * x + t * noise) - (noise - x)
    torch.testing.assert_close(losses, difference.square().mean(1))
    assert ((t[:, 0] * 6).floor() == torch.arange(6)).all()


def test_equations_share_the_path_and_each_learns_its_part():
    """Of two scales: each variable's path ends where it leaves, so the last equation sees nothing of what left."""
    flow, objective = started("ffjord_image"), FlowMatching()
    objective.prepare(flow)
    x = torch.randn(30, 1, 4, 4, dtype=DOUBLE)
    losses = objective.loss(flow, (x, None))
    routes = objective._routes[flow]
    assert [route.last.unique().tolist() for route in routes] == [[2, 3], [2, 3], [3]]
    assert [route.layer.shape for route in routes] == [(1, 4, 4), (4, 2, 2), (2, 2, 2)]
    data = at_first_equation(flow, x, None)
    torch.testing.assert_close(routes[1].take(data), b.Squeeze((1, 4, 4))(data)[0])
    torch.testing.assert_close(routes[2].take(data), b.Squeeze((1, 4, 4))(data)[0][:, :2])
    for number, route in enumerate(routes):  # row i is learned by equation i mod 3
        flow.zero_grad()
        losses[number::3].sum().backward(retain_graph=True)
        assert [any(p.grad is not None and p.grad.any() for p in r.layer.parameters()) for r in routes] == [
            other is route for other in routes
        ]


@pytest.mark.parametrize("name", TINY)
def test_only_the_equations_learn_and_all_of_them(name):
    flow, objective = started(name), FlowMatching()
    objective.prepare(flow)
    objective.loss(flow, (torch.randn(12, *flow.shape, dtype=DOUBLE), None)).mean().backward()
    inside = {p for layer in flow.modules() if isinstance(layer, b.Continuous) for p in layer.parameters()}
    for parameter in flow.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (parameter in inside)


def test_optimal_transport_pairs_what_is_near():
    data, noise = torch.randn(2, 50, 3)
    cost = lambda pairs: (data - pairs).square().sum()
    paired = nearest(data, noise)
    assert cost(paired) < 0.6 * cost(noise)
    torch.testing.assert_close(paired.sort(0).values, noise.sort(0).values)
    best = FlowMatching(coupling="optimal_transport")
    torch.manual_seed(0)
    assert best.loss(gaussian_flow(3), (data, None)).shape == (50,)


def test_two_processes_learn_what_one_does():
    """The noise and the times of a row are those of its place in the global batch."""
    flow, objective = started("ffjord"), FlowMatching()
    x, parts = torch.randn(8, 3, dtype=DOUBLE), []
    torch.manual_seed(3)
    with global_batch.rows(0, 8):
        whole = objective.loss(flow, (x, None))
    for first in (0, 4):
        torch.manual_seed(3)
        with global_batch.rows(first, 8):
            parts.append(objective.loss(flow, (x[first : first + 4], None)))
    torch.testing.assert_close(torch.cat(parts), whole)


# ---- which flows


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("model=maf",), "model: it has no differential equation.*model=cnf"),
        (("model=hybrid",), "model: flow matching trains differential equations, and no [A-Z]\\w+; use"),
        (("base=mixture",), "base: flow matching does not train a Mixture"),
        (("memory=checkpoint",), "memory=checkpoint: "),
        (("compile=true",), "compile=true: "),
        (("objective.coupling=sinkhorn",), "coupling=sinkhorn must be one of independent, optimal_transport"),
        (("objective.times=late",), "times=late must be"),
        (("objective.select=auroc",), "select=auroc must be"),
    ],
)
def test_what_it_cannot_train_is_refused_by_key_before_data_are_opened(words, match):
    from flowtrain.config.build import build_dataset
    from flowtrain.training.setup import prepare

    config = configuration("objective=flow_matching", "dataset=moons", *words)
    with pytest.raises(UsageError, match=match):
        prepare(config, build_dataset(config).spec, torch.device("cpu"))


@pytest.mark.parametrize("net", ["VelocityMLP", "VelocityGains", "VelocityConvNet"])
def test_a_time_for_each_row_is_the_time_of_that_row(net):
    shape = (1, 8, 8) if net == "VelocityConvNet" else (4,)
    made = randomize(getattr(nets, net)(shape, hidden=8, context_shape=(2,)))
    x, context = torch.randn(3, *shape, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    times = torch.rand(3, *[1] * len(shape), dtype=DOUBLE)
    rows = [made(t.flatten()[0], row[None], c[None]) for t, row, c in zip(times, x, context)]
    torch.testing.assert_close(made(times, x, context), torch.cat(rows))


def test_what_a_velocity_network_cannot_be_is_refused():
    for make, match in (
        (partial(nets.VelocityMLP, (1, 4, 4)), "flatten"),
        (partial(nets.VelocityMLP, (4,), depth=0), "depth=0"),
        (partial(nets.VelocityGains, (1, 4, 4)), "flatten"),
        (partial(nets.VelocityGains, (4,), filters=0), "filters=0"),
        (partial(nets.VelocityConvNet, (4,)), "images"),
        (partial(nets.VelocityConvNet, (1, 8, 8), levels=2), "levels=2 must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


# ---- the likelihood


@pytest.mark.parametrize("name", TINY)
def test_a_flow_is_inverted_and_its_log_determinant_is_that_of_its_jacobian(name):
    flow = started(name)
    x = torch.randn(2, *flow.shape, dtype=DOUBLE)
    with torch.no_grad(), exact_trace():
        z, log_det = flow.bijection(x)
        back, other = flow.bijection.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(other, -log_det, rtol=0, atol=1e-5)
    with exact_trace():
        expected = log_abs_det(flow.bijection, x)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-5)


def test_a_density_in_the_plane_integrates_to_one():
    torch.manual_seed(0)
    flow = flows.cnf((2,), hidden=8, depth=1)
    flow.initialize(torch.randn(100, 2))
    randomize(flow.bijection.ode, 0.2)
    flow = flow.double().eval()
    side = torch.linspace(-8, 8, 65, dtype=DOUBLE)
    with torch.no_grad(), exact_trace(), accuracy(1e-4):
        density = flow(torch.cartesian_prod(side, side)).exp()
    assert abs(density.sum().item() * 0.25**2 - 1) < 2e-3
    assert density.max() > 0.05


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_row_does_not_depend_on_the_others(solver):
    """Neither its value nor its steps, with one steep row beside it; the exact velocity gives the exact density."""
    flow = gaussian_flow(3, trace="exact", solver=solver, rtol=1e-3, atol=1e-3, adjoint=False).double().eval()
    x = torch.randn(4, 3, dtype=DOUBLE)
    x[2] *= 40
    with torch.no_grad():
        together = flow(x)
        alone = torch.cat([flow(row[None]) for row in x])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(together, flow.bijection.ode.net.log_prob(x), rtol=1e-2, atol=3e-2)
    torch.testing.assert_close(together, flow(x).detach(), rtol=0, atol=1e-9)  # with gradients too


def test_the_spread_of_the_noises_is_the_error_of_the_trace():
    flow = started("cnf", scale=0.3)
    x = torch.randn(1, 3, dtype=DOUBLE).expand(400, 3)
    with torch.no_grad(), accuracy(1e-3):
        with several_probes(2) as spreads:
            found = flow(x)
        (spread,) = spreads
        with several_probes(8) as of_eight:
            flow(x)
    assert spread.shape == found.shape
    assert spread.mean().item() == pytest.approx(found.var().item(), rel=0.3)
    assert of_eight[0].mean().item() == pytest.approx(spread.mean().item() / 4, rel=0.3)


def test_samples_come_with_their_density_in_one_solve():
    flow = started("cnf", scale=0.3)
    layer, calls = flow.bijection.ode, []
    layer.net.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad(), exact_trace():
        x, log_q = flow.rsample_and_log_prob(5)
        assert len(calls) == layer.evaluations
        torch.testing.assert_close(flow(x), log_q, rtol=0, atol=1e-6)


def test_the_tolerance_is_halved_until_the_figure_moves_less_than_its_error():
    """On means whose error is four times the tolerance: the first halving moves them by twice its half."""
    from flowtrain.runtime import modes

    truth = torch.randn(500, dtype=DOUBLE)

    def evaluate():
        mode = modes.current()
        asked.append((mode.tolerance, mode.step_factor))
        each = truth + 4 * mode.tolerance
        return summarize(each, each, torch.ones(500), None, 3)

    asked: list = []
    stderr = evaluate_at(evaluate, truth)
    result, errors = evaluate_to_its_error(evaluate, 1.0, 3)
    assert errors.solver < stderr <= 2 * errors.solver
    assert asked[1:] == [(0.5**i, 2**i) for i in range(len(asked) - 1)] and len(asked) > 4
    assert errors.rows == pytest.approx(stderr) and errors.probes == 0
    assert result.log_likelihood_stderr == pytest.approx(math.hypot(stderr, errors.solver))
    assert abs(result.log_likelihood - truth.mean().item()) == pytest.approx(errors.solver)


def evaluate_at(evaluate, truth):
    with accuracy(1.0):
        return evaluate().log_likelihood_stderr


# ---- as commands


@pytest.fixture(scope="module")
def gaussian_run(tmp_path_factory):
    """A flow trained by matching on rows of N(0, Σ) in five dimensions, and the true density of its test rows."""
    folder = tmp_path_factory.mktemp("gaussian")
    random = np.random.default_rng(0)
    factor = np.tril(random.normal(size=(5, 5))) + 2 * np.eye(5)
    rows = random.normal(size=(4000, 5)) @ factor.T
    np.savetxt(folder / "rows.csv", rows, delimiter=",", header="a,b,c,d,e", comments="")
    words = "objective=flow_matching model.hidden=16 model.depth=1 dataset=table dataset.path=rows.csv max_steps=60"
    words += " batch_size=64 trainer.val_every=30 trainer.sample_every=null logger=none report=false"
    assert flowtrain(folder, "train", *words.split(), "hydra.run.dir=run") == 0
    return folder, factor


def lines(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_a_run_records_its_loss_and_selects_by_likelihood(gaussian_run):
    folder, _ = gaussian_run
    found = lines(folder)
    assert any("train/matching_loss" in one for one in found) and any("val/log_likelihood" in one for one in found)
    summary = json.loads((folder / "run/summary.json").read_text())
    assert math.isfinite(summary["log_likelihood"]) and summary["steps"] == 60


def test_eval_reports_the_parts_of_its_error_and_they_hold_the_truth(gaussian_run, capsys):
    folder, factor = gaussian_run
    assert flowtrain(folder, "eval", "ckpt=run", "json=true") == 0
    report = json.loads(capsys.readouterr().out)
    errors = report["errors"]
    assert report["trace"] == "exact" and errors["probes"] == 0
    assert report["log_likelihood_stderr"] == pytest.approx(math.hypot(errors["rows"], errors["solver"]))
    entropy = 2.5 * math.log(2 * math.pi * math.e) + math.log(abs(np.linalg.det(factor)))
    # the flow is not the truth, but after whitening it starts near it, and the mean of log p is at most −entropy
    assert -entropy - 0.2 < report["log_likelihood"] < -entropy + 3 * report["log_likelihood_stderr"]
    assert flowtrain(folder, "eval", "ckpt=run") == 0
    text = capsys.readouterr().out
    assert "standard error from  rows" in text and "the figure moved by" in text


def test_above_the_limit_of_exact_traces_the_noises_have_their_part(gaussian_run, capsys, monkeypatch):
    from flowtrain.bijections import ode

    monkeypatch.setattr(ode, "EXACT_LIMIT", 1)
    assert flowtrain(gaussian_run[0], "eval", "ckpt=run", "json=true", "probes=4", "examples=50") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trace"] == "Hutchinson's, 4 noises a draw"
    errors = report["errors"]
    assert 0 < errors["probes"] == pytest.approx(math.sqrt(errors["trace_variance"] / 4 / 50), rel=1e-6)
    assert flowtrain(gaussian_run[0], "eval", "ckpt=run", "examples=50") == 0
    assert "variance of one: " in capsys.readouterr().out


def test_weights_of_images_are_selected_by_loss_where_that_is_asked(tmp_path, capsys):
    words = "objective=flow_matching model=cnf_image model.hidden=8 objective.select=loss dataset=digits smoke=true"
    assert flowtrain(tmp_path, "train", *words.split(), "logger=none", "report=false", "hydra.run.dir=run") == 0
    assert any("val/matching_loss" in one for one in lines(tmp_path))
    assert math.isfinite(json.loads((tmp_path / "run/summary.json").read_text())["bits_per_dim"])


def known_mean(flow, rows, seed):
    """The evaluation of ``rows`` draws of a Gaussian by its exact velocity and two noises of the trace."""
    from flowtrain.commands.evaluation import _Probed
    from flowtrain.engine.evaluate import evaluate

    net = flow.bijection.ode.net
    x = net.sample(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))).detach()
    index = torch.arange(rows)

    def once():
        probed = _Probed(Flow.__call__, 2, rows, "cpu")
        return probed.complete(evaluate(flow, [(index, x, None)], rows, seed=seed, measure=probed), None)

    return *evaluate_to_its_error(once, 1e-2, 8), net.log_prob(x).mean().item()


def test_a_gaussian_of_known_density_lies_within_its_error_bar():
    """Two standard errors hold minus the entropy for as many of 40 seeds as they should, about 38; and those of the
    trace and the solver hold the mean of the true log p of the same rows."""
    flow = gaussian_flow(8).eval()
    net = flow.bijection.ode.net
    truth = -(4 * math.log(2 * math.pi * math.e) + net.log_deviation.sum().item())
    found = [known_mean(flow, 200, seed) for seed in range(40)]
    off = [abs(result.log_likelihood - truth) / result.log_likelihood_stderr for result, *_ in found]
    assert sum(one < 2 for one in off) >= 36
    off_same = [
        abs(result.log_likelihood - same) / math.hypot(errors.probes, errors.solver) for result, errors, same in found
    ]
    assert sum(one < 2 for one in off_same) >= 36
    for some in (off, off_same):  # nor are the bars too long
        assert sum(one < 0.5 for one in some) < 30
    assert all(errors.solver > 0 and errors.probes > 0 for _, errors, _ in found)
