"""Flows as density estimators of the package sbi: its contract, and its own training of them."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import distributions as td
from torch import nn

import flowtrain
from flowtrain import bijections
from flowtrain.runtime.global_batch import RunningMoments

sbi_inference = pytest.importorskip("sbi.inference")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

MODELS = {
    "nsf_autoregressive": {"steps": 2, "hidden": 16, "blocks": 1},
    "nsf_coupling": {"pairs": 1, "hidden": 16, "blocks": 1},
    "maf": {"steps": 2, "hidden": 16, "norm": None},
}


def build(model="nsf_autoregressive", input_shape=(4,), condition_shape=(7,), **keys):
    torch.manual_seed(0)
    theta, x = torch.randn(1000, *input_shape), torch.randn(1000, *condition_shape)
    if len(condition_shape) > 1:
        embedding = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(condition_shape), 5), nn.ReLU())
        keys = {"embedding_net": embedding, "z_score_x": "structured"} | keys
    return flowtrain.sbi.estimator(model, **(MODELS[model] | keys))(theta, x)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """sbi writes its logs into the working directory."""
    monkeypatch.chdir(tmp_path)


# ---- the contract, as sbi's tests/density_estimator_test.py checks it for sbi's own estimators

contract = [
    pytest.mark.parametrize("model", MODELS),
    pytest.mark.parametrize("input_shape", [(1,), (4,)]),
    pytest.mark.parametrize("condition_shape", [(1,), (7,), (7, 2)]),
]


def each(test):
    for mark in contract:
        test = mark(test)
    return test


@each
def test_losses_and_log_probs_have_the_shapes_of_sbi(model, input_shape, condition_shape):
    estimator = build(model, input_shape, condition_shape)
    assert estimator.input_shape == input_shape and estimator.condition_shape == condition_shape
    for batch in (1, 10):
        condition = torch.randn(batch, *condition_shape)
        for samples in (1, 2):
            inputs = torch.rand(batch, *input_shape).mul(10).expand(samples, -1, -1)
            assert estimator.loss(inputs[0], condition=condition).shape == (batch,)
            log_probs = estimator.log_prob(inputs, condition=condition)
            assert log_probs.shape == (samples, batch)
            assert torch.allclose(log_probs[0], log_probs[-1], rtol=1e-4)
            assert torch.allclose(-estimator.loss(inputs[0], condition), log_probs[0])


@each
def test_samples_have_the_shapes_of_sbi(model, input_shape, condition_shape):
    estimator = build(model, input_shape, condition_shape)
    for batch in (1, 10):
        condition = torch.randn(batch, *condition_shape)
        for shape in ((), (1,), (2, 3)):
            assert estimator.sample(shape, condition=condition).shape == (*shape, batch, *input_shape)
            samples, log_probs = estimator.sample_and_log_prob(torch.Size(shape), condition=condition)
            assert samples.shape == (*shape, batch, *input_shape) and log_probs.shape == (*shape, batch)


@each
def test_a_batch_of_conditions_is_each_condition_alone(model, input_shape, condition_shape):
    estimator = build(model, input_shape, condition_shape)
    perturb(estimator)
    condition, inputs = torch.randn(2, *condition_shape), torch.randn(3, 2, *input_shape)
    together = estimator.log_prob(inputs, condition)
    alone = [estimator.log_prob(inputs[:, i : i + 1], condition[i : i + 1]) for i in range(2)]
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-4)

    torch.manual_seed(1)
    together = estimator.sample((4000,), condition)
    for i in range(2):
        assert torch.allclose(together[:, i].mean(0), estimator.sample((4000,), condition[[i]])[:, 0].mean(0), atol=0.2)


def perturb(estimator):
    """Away from the start, where a flow is the identity after a linear regression on its context."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in estimator.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_batches_broadcast_and_others_are_refused():
    estimator = build()
    perturb(estimator)
    one, many = torch.randn(1, 7), torch.randn(5, 7)
    assert estimator.log_prob(torch.randn(3, 1, 4), many).shape == (3, 5)
    assert estimator.log_prob(torch.randn(3, 5, 4), one).shape == (3, 5)
    inputs, conditions = torch.randn(3, 5, 4), torch.randn(3, 5, 7)  # a condition of each sample
    each_row = estimator.log_prob(inputs, conditions)
    assert each_row.shape == (3, 5)
    assert torch.allclose(each_row[1], estimator.log_prob(inputs[1], conditions[1])[0], atol=1e-5)
    with pytest.raises(RuntimeError, match="broadcast"):
        estimator.log_prob(torch.randn(3, 2, 4), many)
    with pytest.raises(ValueError, match="condition"):
        estimator.log_prob(torch.randn(3, 5, 4), torch.randn(5, 6))
    with pytest.raises(ValueError, match="condition"):
        estimator.sample((3,), torch.randn(5, 6))
    with pytest.raises(ValueError, match="input"):
        estimator.loss(torch.randn(5, 3), many)


# ---- what the builder does


def test_both_variables_are_z_scored():
    torch.manual_seed(0)
    theta, x = torch.randn(500, 2), torch.randn(500, 3)

    def log_prob(scale_theta, scale_x):
        torch.manual_seed(5)
        estimator = flowtrain.sbi.estimator("nsf_autoregressive", hidden=16)(
            scale_theta * theta + 7 * scale_theta, scale_x * x - 3 * scale_x
        )
        perturb(estimator)
        return estimator.log_prob(scale_theta * theta[:9] + 7 * scale_theta, scale_x * x[:9] - 3 * scale_x)

    scaled = log_prob(1e4, 1e-3)
    assert torch.allclose(scaled, log_prob(1.0, 1.0) - 2 * math.log(1e4), atol=2e-3)


def test_an_estimator_starts_from_the_linear_regression():
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(1000, 3)
    mean = x @ torch.randn(3, 2)
    theta = mean + torch.tensor([0.1, 2.0]) * torch.randn(1000, 2)
    best = td.Independent(td.Normal(mean, torch.tensor([0.1, 2.0])), 1).log_prob(theta).mean()
    start = flowtrain.sbi.estimator("nsf_autoregressive", hidden=8)(theta, x).log_prob(theta, x).mean()
    assert abs(start - best) < 0.02


def test_splines_are_those_that_reach_further_unless_a_knob_says_otherwise():
    theta, x = torch.randn(100, 2), torch.randn(100, 3)

    def splines(**knobs):
        flow = flowtrain.sbi.estimator("nsf_coupling", hidden=8, **knobs)(theta, x).net
        return {type(module) for module in flow.modules() if isinstance(module, bijections.RationalQuadratic)}

    assert splines() == {bijections.SoftClippedRationalQuadratic}
    assert splines(univariate=bijections.RationalQuadratic) == {bijections.RationalQuadratic}


def test_z_scoring_of_all_dimensions_together_or_none():
    torch.manual_seed(0)
    theta, x = torch.randn(500, 2) * torch.tensor([1.0, 10.0]), 5 * torch.randn(500, 3, 4)
    for choice in ("structured", "none", None):
        estimator = flowtrain.sbi.estimator(z_score_theta=choice, z_score_x=choice, hidden=8)(theta, x)
        std = estimator.net.bijection.layers()["preprocess"].layers()["standardize"].std
        assert (std == 1).all() if choice != "structured" else std[0] == std[1] > 2
        features = estimator.embedding_net(x)
        assert features.shape == (500, 12)
        assert abs(features.std() - (1 if choice == "structured" else 5)) < 0.2


def test_the_embedding_is_trained_with_the_flow_and_the_flow_depends_on_it():
    embedding = nn.Linear(7, 2)
    estimator = build(embedding_net=embedding)
    perturb(estimator)
    estimator.loss(torch.randn(6, 4), torch.randn(6, 7)).mean().backward()
    assert all(parameter.grad is not None for parameter in estimator.parameters())
    assert embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "prior",
    [
        td.Independent(td.Uniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 2.5])), 1),
        td.Independent(td.LogNormal(torch.zeros(2), torch.ones(2)), 1),
        td.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        td.Independent(td.Beta(torch.ones(2), torch.ones(2)), 1),
    ],
    ids=["box", "positive", "real", "unit"],
)
def test_the_posterior_stays_inside_the_prior_and_integrates_to_one_there(prior):
    torch.manual_seed(0)
    theta = prior.sample((2000,))
    x = theta + 0.3 * torch.randn_like(theta)
    estimator = flowtrain.sbi.estimator("nsf_coupling", prior=prior, pairs=1, hidden=16)(theta, x)
    perturb(estimator)
    samples, log_prob = estimator.sample_and_log_prob((20_000,), x[:1])
    assert prior.support.check(samples).all() and log_prob.isfinite().all()
    differences = (log_prob - estimator.log_prob(samples, x[:1])).abs()
    assert (differences < 0.01).float().mean() > 0.998  # float32 holds few digits of the distance to a bound beside it
    wide = td.MultivariateNormal(samples[:, 0].mean(0), 3 * samples[:, 0].detach().T.cov())
    proposals = wide.sample((50_000,))
    ratio = (estimator.log_prob(proposals[:, None], x[:1])[:, 0] - wide.log_prob(proposals)).exp()
    assert abs(ratio.mean() - 1) < max(0.02, 5 * ratio.std() / 50_000**0.5)


def test_the_density_outside_is_zero_and_its_gradients_are_numbers():
    prior = td.Independent(td.Uniform(torch.zeros(4), torch.ones(4)), 1)
    theta, x = prior.sample((200,)), torch.randn(200, 3)
    estimator = flowtrain.sbi.estimator(prior=prior, hidden=8)(theta, x)
    rows = torch.cat([theta[:2], theta[:2] + 2])
    log_prob = estimator.log_prob(rows, x[:4])[0]
    assert log_prob.isfinite().tolist() == [True, True, False, False] and log_prob[2] == -torch.inf
    log_prob[:2].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in estimator.parameters())
    on_the_edge = torch.stack([torch.zeros(4), torch.ones(4)])
    assert estimator.log_prob(on_the_edge, x[:2]).isfinite().all()


def test_a_prior_of_a_list_has_the_bounds_of_each():
    from sbi.utils import process_prior

    prior, *_ = process_prior(
        [
            td.Uniform(torch.tensor([-1.0]), torch.tensor([2.0])),
            td.Normal(torch.zeros(1), torch.ones(1)),
            td.Exponential(torch.ones(1)),
        ]
    )
    theta = prior.sample((300,))
    estimator = flowtrain.sbi.estimator(prior=prior, hidden=8)(theta, theta)
    assert estimator.low.tolist() == [-1, -torch.inf, 0] and estimator.high.tolist() == [2, torch.inf, torch.inf]
    assert prior.support.check(estimator.sample((500,), theta[:3])).all()


def test_bounds_of_a_likelihood():
    theta, x = torch.randn(300, 2), torch.rand(300, 3)
    estimator = flowtrain.sbi.estimator(density="likelihood", bounds=(0, [1.0, 1.0, torch.inf]), hidden=8)(theta, x)
    assert estimator.input_shape == (3,) and estimator.high.tolist() == [1, 1, torch.inf]
    samples = estimator.sample((500,), theta[:2])
    assert (samples >= 0).all() and (samples[..., :2] <= 1).all()


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"model": "nsf"}, "nsf_autoregressive"),
        ({"density": "ratio"}, "density"),
        ({"prior": td.Dirichlet(torch.ones(3))}, "prior"),
        ({"prior": td.Independent(td.Poisson(torch.ones(3)), 1)}, "prior"),
        ({"z_score_x": "zscore"}, "z-scoring"),
        ({"z_score_theta": "transform_to_unconstrained"}, "prior="),
        ({"prior": td.Normal(0.0, 1.0), "bounds": (0, 1)}, "one of them"),
        ({"prior": td.Normal(0.0, 1.0), "density": "likelihood"}, "give bounds= for x"),
    ],
)
def test_wrong_arguments_are_refused_at_once(keys, word):
    with pytest.raises(ValueError, match=word):
        flowtrain.sbi.estimator(**keys)


def test_what_does_not_fit_the_simulations_is_refused():
    theta, x = torch.rand(50, 2), torch.randn(50, 3)
    with pytest.raises(ValueError, match="bounds of 3 dimensions"):
        flowtrain.sbi.estimator(prior=td.Independent(td.Uniform(torch.zeros(3), torch.ones(3)), 1))(theta, x)
    with pytest.raises(ValueError, match="must be a row"):
        flowtrain.sbi.estimator(density="likelihood")(theta, torch.randn(50, 3, 3))
    with pytest.raises(ValueError, match="beyond the bounds"):
        flowtrain.sbi.estimator(bounds=(0, 0.5))(theta, x)


def test_an_estimator_pickles_and_copies():
    estimator = build(bounds=(-10, 10), condition_shape=(7, 2))
    perturb(estimator)
    theta, x = torch.randn(5, 4), torch.randn(5, 7, 2)
    for same in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert torch.equal(same.log_prob(theta, x), estimator.log_prob(theta, x))


# ---- the average of the weights


def trained(average, steps=5, **keys):
    """An estimator after some steps in training mode, and its weights before each and at the end."""
    estimator = build(average=average, **keys)
    theta, x = torch.randn(64, 4), torch.randn(64, 7)
    optimizer = torch.optim.SGD(estimator.parameters(), 1e-2)
    weights = []
    for _ in range(steps):
        optimizer.zero_grad()
        estimator.loss(theta, x).mean().backward()
        estimator.loss(theta, x)  # again, of the same step
        weights.append(flat(estimator))
        optimizer.step()
    return estimator, [*weights, flat(estimator)]


def flat(estimator):
    return torch.cat([one.detach().flatten() for one in estimator.parameters()])


def average_of(weights, decay):
    average = weights[0]
    for one in weights[1:]:
        average = decay * average + (1 - decay) * one
    return average


def test_evaluation_uses_the_average_of_the_weights():
    estimator, weights = trained(0.9)
    average = average_of(weights, 0.9)
    assert not torch.allclose(average, weights[-1], atol=1e-5)
    assert torch.allclose(flat(estimator.eval()), average, atol=1e-6)
    theta, x = torch.randn(5, 4), torch.randn(5, 7)
    density = estimator.log_prob(theta, x)
    for same in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator)), estimator.eval()):
        assert torch.equal(same.log_prob(theta, x), density)
    before = flat(estimator)
    assert torch.equal(flat(estimator.train()), weights[-1])  # to go on with
    with torch.no_grad():
        estimator.log_prob(theta, x)
    assert torch.equal(flat(estimator.eval()), before)  # no step, no change


@pytest.mark.parametrize("training", [True, False])
def test_loaded_weights_are_those_to_train_on(training):
    estimator, _ = trained(0.9)
    saved = copy.deepcopy(estimator.eval().state_dict())
    other, _ = trained(0.9, steps=3)
    other.train(training).load_state_dict(saved)
    assert torch.equal(flat(other.eval()), flat(estimator)) and torch.equal(flat(other.train()), flat(estimator))


@pytest.mark.parametrize("training", [True, False])
def test_the_average_moves_with_the_estimator(training):
    estimator, weights = trained(0.9)
    estimator.train(training).double()
    assert flat(estimator.train()).dtype == torch.float64
    estimator.loss(torch.randn(5, 4).double(), torch.randn(5, 7).double()).mean().backward()
    assert torch.allclose(flat(estimator.eval()), average_of(weights, 0.9).double(), atol=1e-5)


def test_running_moments_are_averaged_too():
    estimator, _ = trained(0.9, steps=20, model="maf", norm=bijections.BatchNorm)
    (mean, *_), running = moments_of(estimator.eval()), moments_of(copy.deepcopy(estimator).train())[0]
    assert not torch.allclose(mean, running, atol=1e-4)


def moments_of(estimator):
    return [module.mean.clone() for module in estimator.modules() if isinstance(module, RunningMoments)]


def test_sbi_ends_with_the_average_and_goes_on_from_it():
    prior, theta, x = simulations(300)
    found = []
    for average in (0.0, 0.9):
        torch.manual_seed(0)
        build = flowtrain.sbi.estimator(prior=prior, steps=1, hidden=16, average=average)
        inference = quiet(sbi_inference.NPE, build, prior).append_simulations(theta, x)
        found.append(inference.train(max_num_epochs=3, learning_rate=1e-2))
    without, estimator = found
    assert not estimator.training and not torch.allclose(flat(estimator), flat(without), atol=1e-4)
    end = flat(estimator)
    inference.train(max_num_epochs=5, resume_training=True)
    assert torch.equal(flat(estimator), end)  # sbi returns a copy


def test_no_average_unless_it_is_wanted():
    estimator, weights = trained(0.0)
    assert torch.equal(flat(estimator.eval()), weights[-1])
    with pytest.raises(ValueError, match="average=1.5 must be at least 0 and below 1"):
        flowtrain.sbi.estimator(average=1.5)


# ---- sbi's own inference


def simulations(rows=2000):
    """θ in a box, x = θ + noise."""
    torch.manual_seed(0)
    prior = td.Independent(td.Uniform(-torch.ones(2), torch.ones(2)), 1)
    theta = prior.sample((rows,))
    x = torch.cat([theta + 0.2 * torch.randn(rows, 2), torch.randn(rows, 1)], 1)
    return prior, theta, x


OBSERVED = torch.tensor([[0.3, -0.4, 0.0]])


def check(samples):
    """The posterior of OBSERVED: normal around the observation, of deviation 0.2, nearly all inside the box."""
    assert torch.allclose(samples.mean(0), OBSERVED[0, :2], atol=0.06)
    assert torch.allclose(samples.std(0), torch.tensor([0.2, 0.2]), atol=0.06)


def quiet(trainer, build, prior):
    return trainer(prior, density_estimator=build, show_progress_bars=False)


def test_posterior_estimation_by_sbi():
    prior, theta, x = simulations()
    build = flowtrain.sbi.estimator("nsf_autoregressive", prior=prior, steps=2, hidden=24, blocks=1)
    inference = quiet(sbi_inference.NPE, build, prior).append_simulations(theta, x)
    inference.train(max_num_epochs=12, learning_rate=3e-3)
    posterior = inference.build_posterior()
    check(posterior.sample((2000,), x=OBSERVED, show_progress_bars=False))
    batch = torch.tensor([[0.99, -0.99, 0.0], [5.0, 5.0, 0.0]])  # where half of a normal posterior lies outside
    samples = posterior.sample_batched((1000,), x=batch, show_progress_bars=False)
    assert samples.shape == (1000, 2, 2) and prior.support.check(samples).all()
    leakage = posterior.leakage_correction(batch[:1], num_rejection_samples=500, show_progress_bars=False)
    assert leakage == 1  # of the density, inside the prior
    inside = posterior.log_prob(theta[:5], x=OBSERVED)
    assert inside.isfinite().all()
    assert posterior.log_prob(torch.tensor([[2.0, 0.0]]), x=OBSERVED) == -torch.inf


def test_sequential_posterior_estimation_by_sbi():
    prior, theta, x = simulations(400)
    inference = quiet(sbi_inference.NPE, flowtrain.sbi.estimator(prior=prior, steps=1, hidden=16), prior)
    inference.append_simulations(theta, x).train(max_num_epochs=3)
    proposal = inference.build_posterior().set_default_x(OBSERVED)
    theta = proposal.sample((200,), show_progress_bars=False)
    x = torch.cat([theta + 0.2 * torch.randn(200, 2), torch.randn(200, 1)], 1)
    estimator = inference.append_simulations(theta, x, proposal=proposal).train(max_num_epochs=3)
    samples = inference.build_posterior(estimator).sample((200,), x=OBSERVED, show_progress_bars=False)
    assert prior.support.check(samples).all()


def test_likelihood_estimation_by_sbi():
    prior, theta, x = simulations()
    build = flowtrain.sbi.estimator("maf", steps=2, hidden=24, norm=None)  # finds by itself that NLE calls it
    inference = quiet(sbi_inference.NLE, build, prior)
    estimator = inference.append_simulations(theta, x).train(max_num_epochs=10, learning_rate=3e-3)
    assert estimator.input_shape == (3,) and estimator.condition_shape == (2,)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 41)] * 2)
    weights = estimator.log_prob(OBSERVED[None].expand(len(grid), 1, 3), grid[:, None])[:, 0].softmax(0).detach()
    mean = (weights[:, None] * grid).sum(0)
    assert torch.allclose(mean, OBSERVED[0, :2], atol=0.08)


def test_each_condition_is_embedded_once_for_all_samples():
    rows = []

    class Noted(nn.Flatten):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    estimator = build(embedding_net=Noted())
    rows.clear()
    estimator.log_prob(torch.randn(50, 3, 4), torch.randn(3, 7))
    estimator.log_prob(torch.randn(50, 1, 4), torch.randn(3, 7))
    estimator.sample((50,), torch.randn(3, 7))
    estimator.sample_and_log_prob((50,), torch.randn(3, 7))
    assert rows == [3, 3, 3, 3]


def test_z_scores_of_bounded_dimensions_are_those_of_their_map_to_the_line():
    theta, x = 0.4 + 0.01 * torch.rand(300, 2), torch.randn(300, 3)
    estimator = flowtrain.sbi.estimator(bounds=(0, 1), hidden=8)(theta, x)
    links = estimator.net.bijection.layers()["preprocess"].layers()
    z = links["standardize"](links["bound"](theta)[0])[0]
    assert z.mean(0).abs().max() < 1e-3 and (z.std(0) - 1).abs().max() < 1e-3


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['sbi'] = None; import flowtrain; flowtrain.sbi"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'flowtrain[sbi]'" in run.stderr.splitlines()[-1]


def test_the_package_alone_does_not_import_sbi():
    code = "import sys, flowtrain; from flowtrain import flows; assert 'sbi' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
