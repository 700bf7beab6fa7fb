"""Residual layers: the estimator against exact log-determinants, networks that contract, the inverse, the commands."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from audit import event, randomize
from inprocess import flowtrain
from ranks import run_on_two_ranks
from torch import nn

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.bijections.ode import exact_trace, replace_unsolved_by_nan, several_probes
from flowtrain.bijections.residual import _SURVIVAL, EXACT_IN_TRAINING
from flowtrain.data.batch import Batch
from flowtrain.engine.objectives import NatsPerRow
from flowtrain.engine.peak import peak_bytes
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.nets.lipschitz import LipschitzConv, LipschitzLinear, LipSwish
from flowtrain.runtime import checkpoint, distributed, modes
from flowtrain.runtime.noise import GivenNoise

DOUBLE = torch.float64
net = partial(nets.LipschitzMLP, hidden=8, depth=1)
estimated = partial(b.Residual, net=net, trace="hutchinson")


def layer_of(shape=(3,), scale=0.5, **kwargs):
    torch.manual_seed(0)
    return randomize(estimated(shape, **kwargs), scale)


class Diagonal(nn.Module):
    """g(x) = a·x for each element, of any Lipschitz constant; it says that it contracts."""

    def __init__(self, shape, slopes, context_shape=None):
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor(slopes).expand(shape).clone())
        self.lipschitz = 0.9

    def forward(self, x, context=None):
        return self.slopes * x


# ---- the estimator


@pytest.mark.parametrize(("terms", "noise"), [("geometric", "rademacher"), ("poisson", "gaussian")])
def test_the_random_series_and_its_gradient_are_unbiased(terms, noise):
    """Their means over many draws lie within four standard errors of what the Jacobian says."""
    layer = layer_of(terms=terms, noise=noise, exact_terms=1, context_shape=(2,)).train()
    x, context = event(layer, 1).expand(20, 3), torch.ones(20, 2, dtype=DOUBLE)
    weights = list(layer.parameters())

    def slopes(log_det):
        found = torch.autograd.grad(log_det.mean(), weights, allow_unused=True)
        return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, weights)])

    with exact_trace():
        exact = layer(x[:1], context[:1])[1]
    exact_slopes = slopes(exact)
    draws = [layer(x, context)[1] for _ in range(200)]
    values, gradients = torch.stack([one.detach().mean() for one in draws]), torch.stack([*map(slopes, draws)])
    assert exact.abs() > 0.02 and values.std() > 1e-3
    assert (values.mean() - exact).abs() < 4 * values.std() / math.sqrt(len(values))
    deviations = (gradients.mean(0) - exact_slopes) / (gradients.std(0) / math.sqrt(len(draws)) + 1e-9)
    assert exact_slopes.norm() > 0.1 and deviations.abs().max() < 5


@pytest.mark.parametrize("terms", ["geometric", "poisson"])
def test_the_number_of_terms_has_the_distribution_that_the_weights_assume(terms):
    """The weight of the k-th random term is one over the share of the draws that have so many."""
    layer, draws = estimated((3,), terms=terms, mean_terms=1.5, exact_terms=2), []
    torch.manual_seed(0)
    for _ in range(4000):
        draws.append(layer._random_weights())
    assert sum(map(len, draws)) / 4000 - 2 == pytest.approx(1.5, abs=0.1)
    for k, probability in zip(range(3, 6), _SURVIVAL[terms](1.5)):
        assert sum(len(one) >= k for one in draws) / 4000 == pytest.approx(probability, abs=0.03)
        assert {one[k - 1] for one in draws if len(one) >= k} == {1 / probability}
    assert all(one[:2] == [1.0, 1.0] for one in draws)


def test_rows_of_any_weight_have_their_own_gradient():
    """That of a weighted sum of log-determinants, and of the output, is the sum of the rows' own."""
    layer = layer_of(context_shape=(2,)).train()
    x, context = event(layer, 4).requires_grad_(), torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)
    scales = torch.tensor([1.0, -2.0, 0.0, 5.0], dtype=DOUBLE)
    sources = [x, context, *layer.net.parameters()]

    def gradient(scales):
        torch.manual_seed(5)
        z, log_det = layer(x, context)
        return torch.autograd.grad((scales * (log_det + z.sin().sum(1))).sum(), sources)

    together = gradient(scales)
    each = [gradient(scales * (torch.arange(4) == i)) for i in range(4)]
    for found, parts in zip(together, zip(*each)):
        torch.testing.assert_close(found, sum(parts))


def test_memory_grows_neither_with_the_terms_nor_with_the_network():
    def bytes_of(terms=2, hidden=16, layers=1):
        torch.manual_seed(0)
        make = partial(
            b.Residual,
            net=partial(nets.LipschitzMLP, hidden=hidden),
            trace="hutchinson",
            exact_terms=terms,
            mean_terms=1e-9,
        )
        flow = Flow((32,), partial(b.Chain, layers={"residual": make}, repeat=layers)).train()
        x = torch.randn(512, 32)
        flow(x)
        return peak_bytes(lambda: flow(x).mean().backward())

    assert bytes_of(terms=40) <= 1.02 * bytes_of(terms=2)
    kept = (bytes_of(layers=6, hidden=256) - bytes_of(layers=2, hidden=256)) / 4
    assert kept < 512 * 32 * 4 * 8 + 4 * 2 * 300_000  # x, v, w, z and their gradients; weights, and theirs
    assert kept < 512 * 256 * 4 * 3  # less than the network's own activations


def test_a_step_reads_nothing_but_its_number_of_terms():
    flow = flows.residual((12,), blocks=3, hidden=8)
    x = torch.randn(16, 12)
    flow.initialize(x)
    flow.train()(x)  # the norms are found once
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.01)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flow(x).mean().backward()
    counts = {one.key: one.count for one in profile.key_averages()}
    assert counts["aten::_local_scalar_dense"] == 3 and not counts.keys() & {"aten::equal", "aten::nonzero"}


# ---- evaluation


def test_a_series_ends_where_the_rest_is_small():
    """Of a diagonal Jacobian Hutchinson's estimate is exact, and so the sum is log det to its bound, for each row."""
    layer = b.Residual((100,), partial(Diagonal, slopes=[0.8] * 50 + [-0.7] * 50)).double().eval()
    _, log_det = layer(torch.randn(3, 100, dtype=DOUBLE))
    exact = torch.full((3,), 50 * math.log(1.8) + 50 * math.log(0.3), dtype=DOUBLE)
    torch.testing.assert_close(log_det, exact, rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(log_det, exact, rtol=0, atol=1e-9)
    log_det.sum().backward()
    slopes = layer.net.slopes
    torch.testing.assert_close(slopes.grad, 3 / (1 + slopes.detach()), rtol=0, atol=1e-4)


def test_hutchinsons_noises_tell_their_error():
    layer = layer_of((80,), scale=0.2).eval()
    x = event(layer, 1).expand(400, 80)
    with torch.no_grad():
        with several_probes(2) as spreads:
            found = layer(x)[1]
        with exact_trace():
            exact = layer(x[:1])[1]
    (spread,) = spreads
    assert (found.mean() - exact).abs() < 4 * found.std() / 20 and found.std() > 1e-3
    assert spread.mean().item() == pytest.approx(found.var().item(), rel=0.3)


@pytest.mark.parametrize("dimensions", [3, 70])
def test_a_row_does_not_depend_on_the_others(dimensions):
    layer = layer_of((dimensions,), noise="gaussian").eval()
    x = torch.randn(4, dimensions, dtype=DOUBLE)
    x[2] *= 1e6
    for run in (layer, layer.inverse):
        together, alone = [], []
        with torch.no_grad():
            noises = torch.rand(4, 2, dimensions, dtype=DOUBLE)
            for rows, results in [(slice(None), together), *((slice(i, i + 1), alone) for i in range(4))]:
                with modes.using(noise=GivenNoise([noises[rows]])):
                    results.append(run(x[rows]))
        for found, parts in zip(together[0], zip(*alone)):
            torch.testing.assert_close(found, torch.cat(parts), rtol=1e-11, atol=1e-11)


def test_a_density_of_the_plane_integrates_to_one():
    flow = randomize(flows.residual((2,), blocks=3, hidden=8), 0.6)
    axis = torch.linspace(-12, 12, 401, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_prob = flow(grid)
    assert (log_prob - Flow((2,), b.Flatten)(grid)).abs().max() > 1  # far from the base
    assert log_prob.exp().sum().item() * 0.06**2 == pytest.approx(1, abs=1e-4)


# ---- networks that contract


def singular_values(layer, sides=None):
    """Those of a layer's linear map, by its matrix."""
    weight = layer.bounded().detach()
    if sides is None:
        return torch.linalg.svdvals(weight)
    units = torch.eye(weight.shape[1] * math.prod(sides), dtype=weight.dtype).view(-1, weight.shape[1], *sides)
    return torch.linalg.svdvals(layer.map(units, weight).flatten(1))


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_trained_layers_have_the_norm_that_they_may_have(kind):
    """In training nearly, in evaluation strictly; and a layer of a small norm is as its weights are."""
    torch.manual_seed(0)
    make = flows.residual if kind == "vector" else flows.residual_image
    shape = (10,) if kind == "vector" else (1, 6, 6)
    flow = make(shape, blocks=1, hidden=8, coeff=0.9).train()
    x = torch.randn(64, *shape).sign() * 2 + 0.1 * torch.randn(64, *shape)
    flow.initialize(x)
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        flow(x).mean().neg().backward()
        optimizer.step()
    layers = [one for one in flow.modules() if isinstance(one, LipschitzLinear | LipschitzConv)]
    sides = {id(one): one.right.shape[2:] if isinstance(one, LipschitzConv) else None for one in layers}
    for mode, slack in ((flow.train, 1.1), (flow.eval, 1 + 1e-4)):
        mode()
        norms = [singular_values(one, sides[id(one)]).max().item() for one in layers]
        assert max(norms) <= 0.9 * slack and max(norms) > 0.899
    small = layers[0]
    with torch.no_grad():
        small.weight.mul_(1e-2)
    assert torch.equal(small.bounded(), small.weight)


def test_a_network_contracts_as_it_says():
    for make, shape in ((nets.LipschitzMLP, (5,)), (nets.LipschitzConvNet, (2, 4, 4))):
        torch.manual_seed(0)
        network = randomize(make(shape, hidden=8, coeff=0.9), 2.0)
        one, other = 3 * torch.randn(2, 500, *shape, dtype=DOUBLE)
        with torch.no_grad():
            ratios = (network(one) - network(other)).flatten(1).norm(dim=1) / (one - other).flatten(1).norm(dim=1)
        assert 0.01 < ratios.max() <= network.lipschitz == pytest.approx(0.9**3)


@pytest.mark.parametrize("b_of", [-5.0, 0.5, 5.0])
def test_lipswish_has_slopes_of_at_most_one(b_of):
    activation = LipSwish().double()
    activation.b.data.fill_(b_of)
    x = torch.linspace(-900, 900, 200_001, dtype=DOUBLE, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation(x).sum(), x)
    assert 0.9 < slopes.abs().max() <= 1


def test_vectors_of_another_size_of_image_are_not_loaded():
    small, large = (LipschitzConv((2, side, side), 3) for side in (4, 6))
    large.train()(torch.randn(1, 2, 6, 6))
    small.load_state_dict(large.state_dict())
    assert torch.equal(small.weight, large.weight) and small.right.shape == (1, 2, 4, 4)
    assert singular_values(small.eval(), (4, 4)).max() <= 0.98 * (1 + 1e-5)


# ---- the inverse


def test_a_network_that_does_not_contract_is_named_in_one_error():
    layer = b.Residual((3,), partial(Diagonal, slopes=1.5), max_steps=50).eval()
    z = torch.ones(2, 3)
    with pytest.raises(FloatingPointError, match="no fixed point after max_steps=50 .*does not contract"):
        layer.inverse(z)
    with replace_unsolved_by_nan() as reasons:
        x, log_det = layer.inverse(z)
    assert x.isnan().all() and len(reasons) == 1
    wide = b.Residual((70,), partial(Diagonal, slopes=1.5)).eval()
    with pytest.raises(FloatingPointError, match="power series .*does not contract"):
        wide(torch.ones(2, 70))
    flow = Flow((3,), partial(b.Chain, layers={"residual": partial(b.Residual, net=partial(Diagonal, slopes=1.5))}))
    with pytest.raises(ValueError, match="does not contract"):
        flow.eval().sample(3)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-5), (DOUBLE, 1e-13)])
def test_the_inverse_is_right_to_roundings(dtype, close):
    flow = randomize(flows.residual((6,), blocks=8, hidden=16), 0.5).to(dtype)
    x = torch.randn(1000, 6, dtype=dtype)
    with torch.no_grad():
        error = (flow.decode(flow.encode(x)) - x).abs()
    assert error.median() < close and error.max() < 50 * close


@pytest.mark.parametrize("dimensions", [4, 66])
def test_the_gradient_of_an_inverse_is_that_of_its_limit(dimensions):
    """In z, the context and the weights, against that of the forward map: for y = f(x), dL = (∂f/∂x)⁻ᵀ ∂L/∂x."""
    layer = layer_of((dimensions,), scale=0.3, context_shape=(2,)).eval()
    z = event(layer, 2).requires_grad_()
    context = torch.randn(2, 2, dtype=DOUBLE, requires_grad=True)
    sources = [z, context, layer.net.layers[0].weight, layer.net.layers[1].bias]
    direction = torch.randn(2, dimensions, dtype=DOUBLE)

    def value():
        return (layer.inverse(z, context)[0] * direction).sum()

    found = torch.autograd.grad(value(), sources)
    for source, gradient in zip(sources, found):
        step = torch.randn_like(source)
        with torch.no_grad():
            moved = []
            for sign in (1, -1):
                source.add_(sign * 1e-5 * step)
                moved.append(value())
                source.sub_(sign * 1e-5 * step)
        assert (gradient * step).sum().item() == pytest.approx(
            ((moved[0] - moved[1]) / 2e-5).item(), rel=1e-5, abs=1e-7
        )


# ---- flows, and what is refused


def test_what_is_exact_when():
    """The random series only in training, and not for a few dimensions."""
    for dimensions, noisy in ((EXACT_IN_TRAINING, [False, False]), (12, [True, False]), (70, [True, True])):
        flow = flows.residual((dimensions,), blocks=2, hidden=8)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(5, dimensions)
        for mode, differs in zip((flow.train, flow.eval), noisy):
            mode()
            assert torch.equal(flow(x), flow(x)) is not differs
        with exact_trace():
            assert torch.equal(flow(x), flow(x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exact_terms": 0}, "exact_terms=0 must be a whole number of at least 1"),
        ({"mean_terms": 0}, "mean_terms=0 must be above 0"),
        ({"max_steps": 0}, "max_steps=0 must be a whole number of at least 1"),
        ({"terms": "uniform"}, "terms='uniform' must be one of geometric, poisson"),
        ({"trace": "none"}, "trace='none' must be one of auto, exact, hutchinson"),
        ({"noise": "uniform"}, "noise='uniform' must be one of rademacher, gaussian"),
        ({"net": partial(net, coeff=1.0)}, "coeff=1.0 must be above 0 and below 1"),
        ({"net": partial(net, hidden=0)}, "hidden=0 must be at least 1"),
    ],
)
def test_arguments_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        b.Residual((2,), **{"net": net, **options})


# ---- two processes


def _gradient(_folder):
    """Of this process's half of a batch, averaged over both."""
    torch.manual_seed(0)
    flow, x = flows.residual((12,), blocks=2, hidden=8), torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    flow.initialize(x)
    training_pass = TrainingPass(flow.train(), NatsPerRow(), seed=1)
    rank, world = distributed.rank(), distributed.world()
    if world > 1:
        training_pass.synchronize()
    for step in range(2):  # numbers of terms that differ
        flow.zero_grad()
        training_pass.backpropagate(Batch(x.chunk(world)[rank]), step, rank, world)
    return [parameter.grad for parameter in flow.parameters()], dict(flow.named_buffers())


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    """Their noise and their numbers of terms are those of the global batch."""
    right, _ = _gradient(tmp_path)
    (one, buffers), (other, same) = run_on_two_ranks(_gradient, tmp_path)
    assert all(map(torch.equal, one, other)) and all(torch.equal(value, same[name]) for name, value in buffers.items())
    for found, expected in zip(one, right):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


# ---- as commands

QUIET = ["logger=none", "report=false", "devices=1"]
WIDE = ["model=residual_image", "dataset=synthetic", "dataset.shape=[1,10,10]", "smoke=true"]
LONG = ["model=residual", "dataset=table", "dataset.path=rows.csv", "model.hidden=8", "model.blocks=2", "batch_size=16"]


def states(run):
    state = checkpoint.read(run / "checkpoints/last.pt")
    return {**state["model"], **{f"ema.{name}": value for name, value in state["ema"].items()}}


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)).sin().numpy()
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",", header=",".join("abcdefghijkl"), comments="")
    words = ["train", *LONG, *QUIET, "deterministic=true", "scheduler=constant", "trainer.ema=0.9"]
    assert flowtrain(tmp_path, *words, "max_steps=6", "hydra.run.dir=whole") == 0
    assert flowtrain(tmp_path, *words, "max_steps=3", "hydra.run.dir=parts") == 0
    assert flowtrain(tmp_path, "train", "resume=parts", "max_steps=6") == 0
    whole, parts = (states(tmp_path / name) for name in ("whole", "parts"))
    assert any(name.endswith("right") for name in whole)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.slow
def test_a_wide_flow_is_evaluated_with_the_error_of_its_noises_sampled_and_reconstructed(tmp_path, capsys):
    assert flowtrain(tmp_path, "train", *WIDE, *QUIET, "hydra.run.dir=run") == 0
    capsys.readouterr()
    assert flowtrain(tmp_path, "eval", "ckpt=run", "json=true", "examples=40") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trace"] == "Hutchinson's, 2 noises a draw" and report["errors"]["solver"] is None
    errors = report["errors"]
    assert errors["probes"] == pytest.approx(math.sqrt(errors["trace_variance"] / 2 / 40), rel=1e-6)
    assert flowtrain(tmp_path, "eval", "ckpt=run", "examples=40") == 0
    text = capsys.readouterr().out
    assert "standard error from  rows" in text and "log-determinant" in text and "tolerance" not in text
    for words in (["sample", "n=4"], ["reconstruct", "n=3"], ["check", "examples=2"]):
        assert flowtrain(tmp_path, *words, "ckpt=run") == 0, words
    with pytest.raises(FlowtrainError, match="to=onnx: .*residual layers.* to=safetensors"):
        flowtrain(tmp_path, "export", "ckpt=run")
    assert flowtrain(tmp_path, "export", "ckpt=run", "to=safetensors") == 0


def test_a_flow_of_few_dimensions_is_evaluated_exactly(tmp_path, capsys):
    assert (
        flowtrain(tmp_path, "train", "model=residual", "dataset=moons", *QUIET, "smoke=true", "hydra.run.dir=run") == 0
    )
    capsys.readouterr()
    assert flowtrain(tmp_path, "eval", "ckpt=run", "json=true") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trace"] == "exact" and report["errors"]["probes"] == 0 and report["examples"] == 200
