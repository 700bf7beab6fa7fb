"""Flows that learn from a target: the targets, the objectives, and what commands make of such runs."""

import csv
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from inprocess import flowtrain
from ranks import run_on_two_ranks

from flowtrain import Flow, flows, targets
from flowtrain import bijections as b
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.commands.eval_target import count_modes, target_table
from flowtrain.commands.metropolis import Metropolis
from flowtrain.data import TargetData
from flowtrain.data.batch import Batch
from flowtrain.distributions import Noise
from flowtrain.engine import importance
from flowtrain.engine.objectives import Alpha2, ReverseKL
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import UsageError
from flowtrain.runtime import checkpoint, distributed, global_batch
from flowtrain.targets.checks import check_target

READY = {
    "funnel": partial(targets.Funnel, 4),
    "eight_schools": targets.EightSchools,
    "mixture40": targets.Mixture40,
    "phi4": partial(targets.Phi4, 3),
    "double_well": targets.DoubleWell,
    "many_well": partial(targets.ManyWell, 8),
}
FAMILIES = {
    "nsf_coupling": partial(flows.nsf_coupling, hidden=8),
    "nsf_autoregressive": partial(flows.nsf_autoregressive, hidden=8),
    "maf": partial(flows.maf, hidden=8, steps=2, norm=b.ActNorm),
    "iaf": partial(flows.iaf, hidden=8, steps=2, norm=b.ActNorm),
    "realnvp_vector": partial(flows.realnvp_vector, hidden=8, pairs=1, norm=b.ActNorm),
    "glow_vector": partial(flows.glow_vector, hidden=8, steps=2),
    "nice": partial(flows.nice, hidden=8),
    "hybrid": partial(flows.hybrid, hidden=8),
}


class Normal(targets.Target):
    """N(mean, 1) in each of two dimensions."""

    name, dimensions, log_z = "normal", 2, 0.0

    def __init__(self, mean=0.0):
        self.mean = mean

    def log_prob(self, x):
        return -0.5 * (x - self.mean).square().sum(1) - math.log(2 * math.pi)


# ---- targets


@pytest.mark.parametrize("name", READY)
def test_a_target_is_differentiable_and_passes_its_own_check(name):
    target = READY[name]()
    check_target(target, target.scale * torch.randn(20, target.dimensions))
    assert target.names is None or len(target.names) == target.dimensions


@pytest.mark.parametrize("name", [name for name in READY if name != "phi4"])
def test_exact_samples_are_of_the_density(name):
    """Stein's identity: E[x·∇log p(x) + D] = 0 and E[∇log p(x)] = 0."""
    target = READY[name]()
    x = target.sample(40_000, torch.Generator().manual_seed(0)).double().requires_grad_()
    (score,) = torch.autograd.grad(target.log_prob(x).sum(), x)
    centre = x.detach().mean(0)
    for terms in (((x - centre) * score + 1).detach(), score):
        keep = terms if name != "funnel" else terms[:, :1]  # the others have heavy tails
        z = keep.mean(0) / (keep.std(0) / len(keep) ** 0.5)
        assert z.abs().max() < 5, z


def test_log_z_of_a_double_well_is_the_integral_over_the_plane():
    axis = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    integral = targets.DoubleWell().log_prob(points).logsumexp(0) + 2 * math.log(0.01)
    assert integral.item() == pytest.approx(targets.DoubleWell().log_z, abs=1e-9)


def test_log_z_of_eight_schools_is_what_importance_sampling_finds():
    target = targets.EightSchools()
    x = target.sample(20_000, torch.Generator().manual_seed(0)).double()
    proposal = torch.distributions.MultivariateNormal(x.mean(0), 1.5 * x.T.cov())
    z = proposal.sample((40_000,))
    found = importance.log_z(target.log_prob(z) - proposal.log_prob(z))
    assert abs(found.value - target.log_z) < 5 * found.stderr and found.stderr < 0.05


def test_every_mode_is_counted_and_a_missing_one_is_not():
    target = targets.Mixture40()
    x = target.sample(20_000, torch.Generator().manual_seed(0))
    assert count_modes(target, x) == 40
    assert count_modes(target, x[target.mode_of(x) != 7]) == 39
    wells = targets.ManyWell(4)
    assert wells.mode_weights().sum().item() == pytest.approx(1)
    assert wells.mode_of(torch.tensor([[1.0, 0, 1, 0], [-1, 0, 1, 0]])).tolist() == [3, 2]


BAD = {
    "NaN at": lambda x: x.sum(1).log(),
    r"\+inf at": lambda x: torch.where(x[:, 0] > 0, torch.inf, x[:, 0]),
    "a density of zero": lambda x: torch.where(x[:, 0] > 0, -torch.inf, x[:, 0]),
    "one number for each row": lambda x: x.square().sum(1, keepdim=True),
    "detached": lambda x: -x.detach().square().sum(1),
    "does not depend": lambda x: torch.zeros(len(x), requires_grad=True) + 0,
    "fails on x": lambda x: x @ torch.ones(7),
    "must return a tensor": lambda x: 3.0,
    "gradient is not finite": lambda x: -(x - x.detach()).norm(dim=1).sqrt(),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_target_is_refused_by_its_name(words):
    target = targets.Function(BAD[words], dimensions=3)
    with pytest.raises(UsageError, match=words) as error:
        check_target(target, torch.randn(50, 3))
    assert target.name in str(error.value) and "\n" not in str(error.value)


def good(x):
    return -x.square().sum(1)


class Sampled(targets.Target):
    name, dimensions, log_prob = "sampled", 3, staticmethod(good)

    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (lambda n: torch.zeros(n, 3), r"sample\(4, generator\) fails: TypeError"),
        (lambda n, generator: torch.zeros(n, 3).numpy(), "must return a tensor, not a ndarray"),
        (lambda n, generator: torch.zeros(n, 3).double(), r"\[4, 3\] of float32 on the CPU, not \[4, 3\] of float64"),
        (lambda n, generator: torch.zeros(3, n), r"not \[3, 4\] of float32 on cpu"),
        (lambda n, generator: torch.full((n, 3), torch.nan), "not finite"),
    ],
)
def test_samples_of_a_target_are_tried_before_training(sample, says):
    with pytest.raises(UsageError, match=says) as error:
        check_target(Sampled(sample), torch.randn(50, 3))
    assert "target sampled" in str(error.value) and "\n" not in str(error.value)
    check_target(Sampled(lambda n, generator: torch.randn(n, 3, generator=generator)), torch.randn(50, 3))


def test_a_target_has_a_name_for_each_coordinate():
    for names in (("a", "b"), ("a", "b", "a"), "abc"):
        target = targets.Function(good, dimensions=3)
        target.names = names
        with pytest.raises(UsageError, match="target .*good: names=.* must be 3 different names"):
            TargetData(target=target)


def test_a_function_says_its_dimensions_or_is_refused():
    def ring(x):
        return -(x.norm(dim=1) - 2).square()

    with pytest.raises(ValueError, match=r"target\.dimensions=D"):
        targets.Function(ring)
    ring.dimensions = 2
    assert targets.Function(ring).dimensions == 2


# ---- noise


@pytest.mark.parametrize("kind", ["normal", "logistic", "uniform"])
def test_noise_of_a_slice_is_that_of_the_global_batch_and_of_an_example_its_own(kind):
    noise = Noise(kind, (3,))
    torch.manual_seed(1)
    whole = noise.draw(8)
    torch.manual_seed(1)
    with global_batch.rows(4, 8):
        assert torch.equal(noise.draw(2), whole[4:6])
    with global_batch.examples(torch.arange(20_000), 5):
        each = noise.draw(20_000)
    with global_batch.examples(torch.tensor([700, 3]), 5):
        assert torch.equal(noise.draw(2), each[[700, 3]])
    var = {"normal": 1.0, "logistic": math.pi**2 / 3, "uniform": 1 / 12}[kind]
    assert each.var().item() == pytest.approx(var, rel=0.03) and each.isfinite().all()


# ---- objectives


def gradient(flow, objective, n, seed):
    torch.manual_seed(seed)
    flow.zero_grad()
    objective.loss(flow, (torch.zeros(n, *flow.shape), None)).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_a_gradient_and_the_path_gradient_the_same_mean(family):
    torch.manual_seed(0)
    flow = FAMILIES[family]((2,))
    flow.initialize(torch.randn(100, 2))
    for parameter in flow.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for kind in (ReverseKL, Alpha2):
        whole, path = (
            torch.stack([gradient(flow, kind(Normal(0.3), path_gradient=path), 300, seed) for seed in range(6)])
            for path in (False, True)
        )
        error = ((whole.var(0) + path.var(0)) / 6).sum().sqrt()
        assert whole.isfinite().all() and path.isfinite().all()
        assert (whole.mean(0) - path.mean(0)).norm() < 3 * error + 1e-6
        assert (whole != 0).any(0).float().mean() > 0.5  # rectifiers may be off


def affine_flow(mean):
    flow = Flow((2,), partial(b.Elementwise, univariate=b.ExpAffine))
    flow.double()
    with torch.no_grad():
        flow.sample(1)
        flow.bijection.inverse(torch.zeros(1, 2, dtype=torch.float64))
        for parameter in flow.parameters():
            parameter.zero_()
            if mean:
                parameter[..., 0] = -mean
    return flow


def test_the_path_gradient_has_no_variance_where_the_flow_is_the_target():
    flow = affine_flow(0.0)
    assert flow.log_prob(torch.ones(1, 2)).item() == pytest.approx(Normal().log_prob(torch.ones(1, 2)).item())
    for kind in (ReverseKL, Alpha2, partial(ReverseKL, cover=1.0)):
        assert gradient(flow, kind(Normal(), path_gradient=True), 50, 1).abs().max() < 1e-12
        assert gradient(flow, kind(Normal()), 50, 1).abs().max() > 1e-3


@pytest.mark.parametrize("cover", [0.0, 1.0, 3.0])
def test_cover_adds_the_gradient_of_the_forward_divergence(cover):
    """For q = N(m, I) and p = N(0, I): both divergences are m²/2 for each dimension, and their gradients in m are m."""
    flow, objective = affine_flow(0.4), ReverseKL(Normal(), cover=cover)
    torch.manual_seed(0)
    losses = objective.loss(flow, (torch.zeros(200_000, 2), None))
    assert 2 * losses.mean().item() == pytest.approx(2 * 0.4**2 / 2, abs=0.01)
    losses.mean().backward()
    (theta,) = flow.parameters()
    assert theta.grad.flatten(0, -2)[..., 0].mean().item() == pytest.approx(-(1 + cover) * 0.4 / 2, abs=0.01)


class Pair(targets.Target):
    """Two normals in the plane, eight apart, of standard deviation 0.5."""

    name, dimensions, scale = "pair", 2, 4.0

    def log_prob(self, x):
        return torch.logaddexp(*(-0.5 * ((x - centre) / 0.5).square().sum(1) for centre in (-4.0, 4.0)))


@pytest.mark.parametrize(("cover", "least", "most"), [(0.0, 0, 0), (1.0, 20, 2000)])
def test_a_flow_that_sits_at_one_mode_finds_the_other_by_cover(cover, least, most):
    torch.manual_seed(0)
    target, flow = Pair(), flows.nsf_coupling((2,), pairs=1, hidden=16)
    flow.initialize(4 + 0.5 * torch.randn(512, 2))
    assert (flow.sample(2000).sum(1) > 0).all()
    objective, optimizer = ReverseKL(target, cover=cover), torch.optim.Adam(flow.parameters(), lr=3e-2)
    for _ in range(30):
        optimizer.zero_grad()
        objective.loss(flow, (torch.zeros(256, 2), None)).mean().backward()
        optimizer.step()
    assert least <= (flow.sample(2000).sum(1) < 0).sum() <= most


@pytest.mark.parametrize("path", [False, True])
def test_alpha_two_is_half_the_second_moment_and_so_is_its_gradient(path):
    """For q = N(m, I) and p = N(0, I): ½ log E_q[w²] = m²/2 for each dimension, and its gradient in m is m."""
    flow, objective = affine_flow(0.4), Alpha2(Normal(), path_gradient=path)
    torch.manual_seed(0)
    losses = objective.loss(flow, (torch.zeros(200_000, 2), None))
    assert 2 * losses.mean().item() == pytest.approx(2 * 0.4**2 / 2, abs=0.01)
    losses.mean().backward()
    (theta,) = flow.parameters()  # z = x·exp(s) + t, so that t = −m, and the loss is per dimension
    assert theta.grad.flatten(0, -2)[..., 0].mean().item() == pytest.approx(-0.4 / 2, abs=0.01)


def test_annealing_raises_the_power_of_the_target_to_one():
    target = Normal(mean=3.0)
    target.scale = 2.0
    objective = ReverseKL(target, anneal=0.5, anneal_from=0.01)
    powers, densities = [], []
    x, start = torch.randn(5, 2), torch.distributions.Normal(0.0, 2.0)
    for spent in (0.0, 0.25, 0.5, 0.9):
        objective.begin_step(spent)
        powers.append(objective.power)
        densities.append(objective.log_density(x))
    assert powers == pytest.approx([0.01, 0.1, 1.0, 1.0])
    assert torch.allclose(densities[1], 0.1 * target.log_prob(x) + 0.9 * start.log_prob(x).sum(1))
    assert torch.equal(densities[3], target.log_prob(x))
    with pytest.raises(ValueError, match="anneal=0"):
        ReverseKL(Normal(), anneal=0)


def on_rank(folder):
    gradients = []
    for kind in (ReverseKL, Alpha2, partial(ReverseKL, cover=1.0, anneal=0.5)):
        torch.manual_seed(0)
        flow = FAMILIES["nsf_coupling"]((2,))
        training_pass = TrainingPass(flow, kind(targets.DoubleWell(), path_gradient=True), seed=1)
        if distributed.world() > 1:
            training_pass.synchronize()
        for step in range(2):
            flow.zero_grad()
            batch = Batch(torch.zeros(16 // distributed.world(), 2))
            training_pass.backpropagate(batch, step, distributed.rank(), distributed.world())
        gradients += [parameter.grad for parameter in flow.parameters()]
    return gradients


@pytest.mark.slow
def test_two_processes_find_the_gradient_of_one(tmp_path):
    alone = on_rank(tmp_path)
    for together in run_on_two_ranks(on_rank, tmp_path):
        assert all(torch.allclose(one, two, atol=1e-5, rtol=1e-4) for one, two in zip(alone, together, strict=True))


# ---- importance weights


def test_importance_figures_of_two_normals():
    """q = N(0, 1), p = e·N(m, 1): ESS/n = exp(−m²), log Z = 1."""
    m, generator = 0.7, torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator, dtype=torch.float64)
    log_w = 1 + m * x - m**2 / 2
    of_exact = log_w + m * m  # at x + m
    z, ess, forward = (
        importance.log_z(log_w),
        importance.effective_share(log_w),
        importance.forward_effective_share(of_exact),
    )
    assert abs(z.value - 1) < 4 * z.stderr and z.stderr < 0.01
    assert abs(ess.value - math.exp(-(m**2))) < 4 * ess.stderr and ess.stderr < 0.02
    assert abs(forward.value - math.exp(-(m**2))) < 4 * forward.stderr and forward.stderr < 0.02
    some = log_w[:500].exp()
    brute = torch.minimum(some[:, None], some[None]).sum() / (500 * some.sum())
    assert importance.acceptance(log_w[:500]) == pytest.approx(brute.item())


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_the_pareto_shape_of_weights(k):
    u = torch.rand(20, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shapes = [importance.pareto_shape(100 - k * one.log()) for one in u]
    assert np.mean(shapes) == pytest.approx(k, abs=0.05) and np.std(shapes) < 0.1
    assert importance.pareto_shape(torch.zeros(50)) == 0
    assert importance.pareto_shape(-torch.linspace(0, 1e6, 1000)) > 1
    with pytest.raises(ValueError, match="at least 25"):
        importance.pareto_shape(torch.zeros(24))


def test_the_table_says_where_weights_are_not_reliable():
    report = dict.fromkeys(("target", "weights", "checkpoint"), "x") | {"log_z_exact": None, "examples": 9}
    report |= dict.fromkeys(("elbo", "log_z", "ess", "elbo_stderr", "log_z_stderr", "ess_stderr", "acceptance"), 0.5)
    report |= {"dimensions": 2, "zero_weights": 0}
    lines = {k: target_table(report | {"pareto_shape": k}) for k in (0.5, 0.9)}
    assert "0.50\n" in lines[0.5] and "their errors are too small" in lines[0.9]


def test_standard_errors_are_the_spread_of_repeated_estimates():
    generator = torch.Generator().manual_seed(0)
    log_w = 0.5 * torch.randn(400, 500, generator=generator, dtype=torch.float64)
    for estimate in (importance.log_z, importance.effective_share, importance.forward_effective_share):
        found = [estimate(one) for one in log_w]
        spread = np.std([one.value for one in found])
        assert np.mean([one.stderr for one in found]) == pytest.approx(spread, rel=0.25)


def test_metropolis_chains_have_the_target_as_their_distribution():
    chains = Metropolis(seed=1, chains=50, burn_in=20)
    n = chains.proposals(20_000)
    x = 1.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_w = -0.5 * x[:, 0] ** 2 + 0.5 * (x[:, 0] / 1.5) ** 2
    states = chains.feed(x, log_w)
    assert len(states) == 20_000
    assert states.std().item() == pytest.approx(1, abs=0.03)
    assert chains.acceptance == pytest.approx(importance.acceptance(log_w), abs=0.02)


# ---- commands

SMALL = ["model.hidden=8", "model.pairs=1", "model.blocks=1", "batch_size=64", "logger=none", "trainer.log_every=5"]
TRAIN = [
    "train",
    "objective=reverse_kl",
    "target=double_well",
    "scheduler=constant",
    "objective.anneal=null",
    "trainer.val_every=5",
    *SMALL,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    assert flowtrain(folder, *TRAIN, "max_steps=10", "objective.path_gradient=true", "hydra.run.dir=run") == 0
    return folder / "run"


def test_a_run_records_its_bound_and_its_report_names_it(run):
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "log_likelihood" not in summary and summary["elbo"] < targets.DoubleWell().log_z
    assert {line["step"] for line in lines if "val/elbo" in line} == {5, 10}
    assert (run / "samples" / "samples_00000010.png").is_file()
    assert "evidence lower bound" in (run / "report.html").read_text()


def test_eval_of_a_target(run, capsys):
    assert flowtrain(run.parent, "eval", f"ckpt={run}", "examples=2000") == 0
    printed = capsys.readouterr().out
    report = json.loads(max(run.glob("eval/*/eval.json")).read_text())
    assert "modes found" in printed and "exact: 10.2935" in printed
    assert "Pareto k" in printed and report["pareto_shape"] < 3
    assert report["examples"] == 2000 and 0 < report["ess"] < 1 and report["modes"] == 2
    assert abs(report["log_z"] - report["log_z_exact"]) < 5 * report["log_z_stderr"] + 0.2
    assert len(np.load(max(run.glob("eval/*/log_weights.npy")))) == 2000


def test_samples_with_weights_and_by_metropolis(run, caplog):
    assert flowtrain(run.parent, "sample", f"ckpt={run}", "n=300", "weights=true", "plot=false") == 0
    folder = max(run.glob("sample/*"))
    x, log_w = np.load(folder / "samples.npy"), np.load(folder / "log_weights.npy")
    with open(folder / "samples.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["log_weight"]) for row in rows] == pytest.approx(log_w)
    import flowtrain as library

    flow = library.load(run)
    expected = targets.DoubleWell().log_prob(torch.from_numpy(x)) - flow.log_prob(torch.from_numpy(x))
    assert log_w == pytest.approx(expected.detach().numpy(), abs=1e-3)
    assert flowtrain(run.parent, "sample", f"ckpt={run}", "n=300", "mcmc=true", "plot=false") == 0
    states = np.load(max(run.glob("sample/*")) / "samples.npy")
    assert states.shape == (300, 2) and len(np.unique(states, axis=0)) < 300  # a rejected step repeats a state


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    flowtrain(tmp_path, *TRAIN, "max_steps=8", "report=false", "hydra.run.dir=whole")
    flowtrain(tmp_path, *TRAIN, "max_steps=4", "report=false", "hydra.run.dir=half")
    flowtrain(tmp_path, "train", "resume=half", "max_steps=8")
    whole, half = (checkpoint.read(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "half"))
    assert whole["step"] == half["step"] == 8
    assert all(torch.equal(whole["model"][name], half["model"][name]) for name in whole["model"])


def refusal(tmp_path, *words):
    with pytest.raises(Exception) as error:
        flowtrain(tmp_path, "train", "smoke=true", *words)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["target=funnel", "model=maf"], "use norm=actnorm"),
        (["target=funnel", "base=mixture"], "use base=normal"),
        (["target=funnel", "memory=checkpoint"], "memory=checkpoint"),
        (["target=funnel", "compile=true"], "compile=true"),
        (["target=funnel", "target.dimensions=1"], "dimensions=1 must be at least 2"),
        (["target=funnel", "dataset=moons"], "learn from a target"),
        (["target=fannel"], "did you mean 'funnel'"),
        ([], "target=funnel, or your own"),
        (["target=no_such:log_prob"], "allow="),
    ],
)
def test_what_a_target_does_not_allow_is_refused(words, says, tmp_path):
    assert says in refusal(tmp_path, "objective=reverse_kl", *words)


def test_a_function_of_ones_own_by_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "ring_of_mine.py").write_text(
        "def log_prob(x):\n    return -0.5 * ((x.norm(dim=1) - 2) / 0.3) ** 2\n\n\nlog_prob.dimensions = 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["target=ring_of_mine:log_prob", "allow=[ring_of_mine]", "max_steps=2", "hydra.run.dir=run"]
    assert flowtrain(tmp_path, "train", "objective=alpha2", *own, *SMALL) == 0
    assert flowtrain(tmp_path, "eval", "ckpt=run", "allow=[ring_of_mine]", "examples=500") == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_samples_where_the_density_is_zero_have_weight_zero(tmp_path, monkeypatch, capsys):
    """A normal that after training is cut off; any other value that is no density ends the evaluation."""
    (tmp_path / "cut_of_mine.py").write_text(
        "import torch\n\nAT, WITH = torch.inf, -torch.inf\n\n\ndef log_prob(x):\n"
        "    return torch.where(x[:, 0] < AT, -0.5 * x.square().sum(1), WITH)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["target=cut_of_mine:log_prob", "target.dimensions=1", "model=maf", "norm=none", "model.hidden=4"]
    allow = "allow=[cut_of_mine]"
    words = [*own, "max_steps=1", "hydra.run.dir=run", "logger=none", "report=false", allow]
    assert flowtrain(tmp_path, "train", "objective=reverse_kl", *words) == 0
    import cut_of_mine

    cut_of_mine.AT = 1.0
    capsys.readouterr()
    assert flowtrain(tmp_path, "eval", "ckpt=run", "examples=2000", allow) == 0
    report = json.loads(max(tmp_path.glob("run/eval/*/eval.json")).read_text())
    log_w = np.load(max(tmp_path.glob("run/eval/*/log_weights.npy")))
    share = 1 - report["zero_weights"] / 2000
    assert report["elbo"] is None and report["zero_weights"] == np.isneginf(log_w).sum()
    assert share == pytest.approx(0.841, abs=0.05) and report["ess"] <= share + 1e-6
    exact = 0.5 * math.log(2 * math.pi) + math.log(0.8413)
    assert report["log_z"] == pytest.approx(exact, abs=5 * report["log_z_stderr"])
    assert f"2,000, {report['zero_weights']:,} where the target's density is 0" in capsys.readouterr().out
    assert flowtrain(tmp_path, "sample", "ckpt=run", "n=200", "mcmc=true", "plot=false", allow) == 0
    assert np.load(max(tmp_path.glob("run/sample/*/samples.npy"))).max() < 1  # states of the chains
    for at, value, says in (
        (1.0, torch.nan, "not finite"),
        (1.0, torch.inf, "not finite"),
        (-99.0, -torch.inf, "density is 0 at all 2,000"),
    ):
        cut_of_mine.AT, cut_of_mine.WITH = at, value
        with pytest.raises(WorkerError, match=says):
            flowtrain(tmp_path, "eval", "ckpt=run", "examples=2000", allow)
    cut_of_mine.AT, cut_of_mine.WITH = 1.0, torch.nan
    with pytest.raises(WorkerError, match="of 200 samples have no importance weight"):
        flowtrain(tmp_path, "sample", "ckpt=run", "n=200", "weights=true", "plot=false", allow)


def test_points_to_show_of_a_target_without_samples_are_drawn_on_a_grid():
    ring = targets.Function(lambda x: -0.5 * ((x.norm(dim=1) - 2) / 0.3) ** 2, dimensions=2)
    points, _ = TargetData(target=ring).split("val").shown(5000)
    assert (points.norm(dim=1) - 2).abs().mean().item() == pytest.approx(0.3 * math.sqrt(2 / math.pi), abs=0.02)


def test_callables_of_every_kind_are_targets():
    def log_prob(x, beta=1.0):
        return -0.5 * beta * x.square().sum(1)

    x = torch.ones(2, 3)
    assert targets.Function(partial(log_prob), dimensions=3).log_prob(x).tolist() == [-1.5, -1.5]
    assert targets.Function(partial(log_prob, beta=4.0), dimensions=3).log_prob(x).tolist() == [-6.0, -6.0]
    module = torch.nn.Linear(3, 1)
    assert targets.Function(module, dimensions=3).name.endswith("Linear")


def test_the_modes_of_very_many_wells_are_not_counted():
    assert targets.ManyWell(40).modes == 2**20 and targets.ManyWell(130).modes is None
