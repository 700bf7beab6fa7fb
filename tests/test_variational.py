"""Variational dequantization, and the importance-weighted bound of dequantized data."""

import gc
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from audit import jacobian_log_det, randomize
from composed import flow_of
from inprocess import flowtrain
from ranks import run_on_two_ranks
from test_commands import EVAL, SAMPLE, TINY, of_checkpoint, train_run

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.commands import eval as evaluation
from flowtrain.commands import sample
from flowtrain.engine.audit import audit, perturb
from flowtrain.engine.evaluate import evaluate, log_likelihoods
from flowtrain.engine.objectives.flow_matching import check
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch, modes
from flowtrain.runtime.noise import GivenNoise
from flowtrain.scores.chain_rule import ChainRule

VARIATIONAL = partial(
    b.VariationalDequantize,
    noise=partial(flows.parts.noise_couplings, steps=2, hidden=8),
    net=partial(nets.Features, features=4),
)
CENTER = partial(flows.parts.center, dequantize=VARIATIONAL)
SHAPES = [(1, 4, 6), (2, 3, 3), (3,), (1,)]  # squeezed, a checkerboard, vectors


def layer_of(shape, grey_levels=5, scale=0.1):
    torch.manual_seed(0)
    return randomize(VARIATIONAL(shape, grey_levels), scale)


def run(layer, x, u):
    with modes.using(noise=GivenNoise([u])):
        return layer(x)


NOISE = {  # any layers can make the noise
    "conditional": ((2, 3, 3), partial(b.Conditional, univariate=b.ExpAffine, net=partial(nets.ConvNet, hidden=4))),
    "autoregressive": ((3,), partial(b.Autoregressive, univariate=b.ExpAffine, net=partial(nets.MADE, hidden=8))),
    "splines": (
        (3,),
        partial(
            b.Chain,
            layers={
                "mixing": b.LULinear,
                "coupling": partial(b.Coupling, univariate=b.RationalQuadratic, net=partial(nets.MLP, hidden=8)),
            },
        ),
    ),
}
EVERY = {**{str(shape): (shape, VARIATIONAL.keywords["noise"]) for shape in SHAPES}, **NOISE}


@pytest.mark.parametrize("name", EVERY)
def test_the_log_determinant_is_that_of_the_noise_by_autograd(name):
    """y = (x + ε(u))/L with a uniform u: −log q(ε | x) − D log L is log|det ∂y/∂u|."""
    shape, noise = EVERY[name]
    torch.manual_seed(0)
    layer, x = randomize(VARIATIONAL(shape, 5, noise=noise), 0.1), torch.randint(0, 5, (3, *shape))
    u = torch.rand(3, *shape).double()
    _, log_det = run(layer, x, u)
    right = torch.stack(
        [
            jacobian_log_det(lambda u, _, one=one: run(layer, one, u), v, None)[0]
            for one, v in zip(x.split(1), u.split(1))
        ]
    )
    torch.testing.assert_close(log_det, right)
    assert (log_det - layer.log_det).abs().min() > 1e-3  # it is not the uniform one's


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_one_is_uniform(shape):
    torch.manual_seed(0)
    layer, uniform = VARIATIONAL(shape, 256), b.Dequantize(shape, 256)
    x, u = torch.randint(0, 256, (50, *shape)), torch.rand(50, *shape)
    for found, right in zip(run(layer, x, u), run(uniform, x, u)):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_come_back_whatever_the_noise(shape):
    layer, x = layer_of(shape, 256, scale=3.0).float(), torch.randint(0, 256, (200, *shape))
    assert torch.equal(layer.inverse(layer(x)[0])[0], x.to(torch.uint8))
    with global_batch.bin_centres():
        torch.testing.assert_close(layer(x)[0], (x + 0.5) / 256)
    for wrong in (-1, 256, 3.5, math.nan):
        assert layer(torch.full((1, *shape), wrong, dtype=torch.float32))[0].isnan().all()


def test_the_density_of_the_noise_integrates_to_one():
    """∫ q dε over the unit square, where ε is known by its place: the inverse of the couplings finds the density."""
    layer, x = layer_of((2,)), torch.tensor([[0, 3]])
    side = (torch.arange(400).double() + 0.5) / 400
    noise = torch.cartesian_prod(side, side)
    features = layer.net((2 * x.double() + 1) / 5 - 1).expand(len(noise), -1)
    line = torch.logit(noise)
    start, log_det = layer.noise.inverse(line, features)
    u = torch.sigmoid(start)
    density = (log_det + (torch.log(u * (1 - u)) - torch.log(noise * (1 - noise))).sum(1)).exp()
    assert density.mean().item() == pytest.approx(1, abs=1e-3)
    _, reported = run(layer, x.expand(len(u), 2), u)
    torch.testing.assert_close(-(reported - layer.log_det), density.log(), rtol=0, atol=1e-6)


# -- the bound


def toy(dequantize=b.Dequantize, scale=0.2):
    """A flow of two integers from 0 to 2, and all nine pairs."""
    torch.manual_seed(3)
    layers = {
        "dequantize": partial(dequantize, grey_levels=3),
        "logit": partial(b.Logit, alpha=0.0),
        "coupling": partial(b.Coupling, univariate=b.ExpAffine, net=partial(nets.MLP, hidden=8)),
        "other": partial(
            b.Coupling, univariate=b.ExpAffine, net=partial(nets.MLP, hidden=8), partition=partial(b.Halves, swap=True)
        ),
    }
    flow = randomize(Flow((2,), partial(b.Chain, layers=layers)), scale)
    return flow, torch.tensor([*itertools.product(range(3), repeat=2)])


def exact(flow, x, points=200):
    """log P(x) = log ∫ p(x + u) du by the midpoint rule, (B,)."""
    side = (torch.arange(points).double() + 0.5) / points
    u = torch.cartesian_prod(side, side)
    after = list(flow.bijection)[1:]
    found = []
    for one in x:
        z, total = (one + u) / 3, torch.full((len(u),), -2 * math.log(3)).double()
        for layer in after:
            z, log_det = layer(z)
            total = total + log_det
        found.append((flow.base.log_prob(z) + total).logsumexp(0) - 2 * math.log(points))
    return torch.stack(found).detach()


@pytest.mark.parametrize("dequantize", [b.Dequantize, VARIATIONAL])
def test_the_bounds_rise_to_the_truth(dequantize):
    flow, x = toy(dequantize)
    truth = exact(flow, x)
    assert truth.exp().sum().item() == pytest.approx(1, abs=1e-3)
    many, copies = x.repeat(400, 1), 400
    index = torch.arange(len(many))
    found, errors = [], []
    for draws in (1, 4, 64):
        result = evaluate(flow, [(index, many, None)], len(many), draws)
        if draws == 1:
            assert result.log_likelihood_iw is None
            found.append(result.log_likelihood)
        else:
            assert result.log_likelihood < result.log_likelihood_iw
            assert result.bits_per_dim_iw == pytest.approx(-result.log_likelihood_iw / (2 * math.log(2)))
            assert result.bits_per_dim_iw_stderr == pytest.approx(result.log_likelihood_iw_stderr / (2 * math.log(2)))
            found.append(result.log_likelihood_iw)
        _, weighted = log_likelihoods(flow, index, many, None, draws)
        spread = weighted.view(copies, len(x)).std(0).square().mean().item()  # of the draws alone
        errors.append(math.sqrt(spread / len(many)))
    right = truth.mean().item()
    assert all(low < high + 3 * error for low, high, error in zip(found, found[1:], errors))
    assert found[0] + 0.01 < right and all(one < right + 3 * error for one, error in zip(found, errors))
    assert found[2] == pytest.approx(right, abs=3 * errors[2] + (right - found[0]) / 16)


def test_draws_are_summed_as_they_come():
    """As logsumexp over all of them, with as many tensors alive at the last draw as at the second."""
    flow, x = toy()
    alive, values = {}, []

    def measure(flow, x, context):
        if len(values) in (1, 59):
            alive[len(values)] = sum(type(one) is torch.Tensor for one in gc.get_objects())
        result = flow(x, context)
        values.append(result.tolist())
        return result

    with torch.no_grad():
        mean, weighted = log_likelihoods(flow, torch.arange(len(x)), x, None, 60, measure=measure)
    each = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(weighted, each.logsumexp(0) - math.log(60), rtol=0, atol=1e-12)
    torch.testing.assert_close(mean, each.mean(0), rtol=0, atol=1e-12)
    assert alive[1] == alive[59]


def test_a_bound_does_not_depend_on_batches_and_is_fixed_by_the_seed():
    flow, x = toy(VARIATIONAL)
    index = torch.arange(len(x))
    batches = [(part, x[part], None) for part in index.split(4)]
    one, other = evaluate(flow, [(index, x, None)], 9, 5, seed=1), evaluate(flow, batches, 9, 5, seed=1)
    assert one.log_likelihood_iw == pytest.approx(other.log_likelihood_iw, rel=1e-12)
    assert one == evaluate(flow, [(index, x, None)], 9, 5, seed=1) != evaluate(flow, [(index, x, None)], 9, 5, seed=2)


def test_training_the_noise_alone_closes_the_gap():
    flow, x = toy(VARIATIONAL, scale=0.0)
    with torch.no_grad():  # a flow whose density varies within a bin
        for layer in (flow.bijection.coupling, flow.bijection.other):
            layer.net.last.bias.copy_(torch.tensor([0.5, 1.0]))
    truth, many = exact(flow, x).mean().item(), x.repeat(30, 1)

    def bound():
        torch.manual_seed(0)
        return flow(x.repeat(400, 1)).mean().item()

    uniform, noise = bound(), flow.bijection.dequantize
    optimizer = torch.optim.Adam(noise.parameters(), lr=0.02)
    for step in range(150):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (-flow(many).mean()).backward()
        optimizer.step()
    assert uniform < truth - 0.05
    assert truth - bound() < (truth - uniform) / 4


# -- as layers of a flow


def test_what_is_refused():
    with pytest.raises(ValueError, match="noise: takes layers that keep the shape"):
        b.VariationalDequantize((1, 4, 4), 5, noise=b.Squeeze, net=nets.Features)
    with pytest.raises(ValueError, match="noise: takes bijections, not a surjection"):
        b.VariationalDequantize((3,), 5, noise=partial(b.Dequantize, grey_levels=3), net=nets.Features)
    with pytest.raises(ValueError, match="net: features are of images"):
        VARIATIONAL((3, 4), 5)
    with pytest.raises(ValueError, match="noise: steps=0 must be at least 1"):
        b.VariationalDequantize((3,), 5, partial(flows.parts.noise_couplings, steps=0), nets.Features)
    with pytest.raises(ValueError, match=r"a context image of 4×6 pixels, not \[3, 2, 2\]"):
        nets.ConvNet((1, 4, 6), 2, context_shape=(3, 2, 2))
    with pytest.raises(ValueError, match="VariationalDequantize\\) mixes columns"):
        ChainRule(flows.maf((3,), steps=1, hidden=8, preprocess=partial(VARIATIONAL, grey_levels=5)))


@pytest.mark.parametrize("words", ["dataset=moons", "model=autoregressive", "preprocess=noise", "preprocess=none"])
def test_where_nothing_reads_it_one_line_says_so(words):
    with pytest.raises(UsageError, match="dequantize: only preprocess=center, logit and normalize of integers read it"):
        flow_of("model=maf", *words.split(), "dequantize=variational", device="meta")


class Wrong(b.ExpAffine):
    """A map whose log-derivative is one percent off."""

    def forward(self, x, theta):
        y, log_derivative = super().forward(x, theta)
        return y, 1.01 * log_derivative


@pytest.mark.parametrize("univariate", [b.ExpAffine, Wrong])
def test_the_audit_sees_the_layers_of_the_noise(univariate):
    noise = partial(flows.parts.noise_couplings, steps=2, hidden=4, univariate=univariate)
    center = partial(flows.parts.center, grey_levels=5, dequantize=partial(VARIATIONAL, noise=noise))
    flow = flows.glow((1, 4, 4), levels=1, steps=1, hidden=4, preprocess=center)
    x = torch.randint(0, 5, (8, 1, 4, 4))
    torch.manual_seed(0)
    perturb(flow, x)
    failed = {check.name: check.layer for check in audit(flow, x, grey_levels=5) if not check.passed}
    if univariate is b.ExpAffine:
        assert not failed
    else:
        assert "preprocess.dequantize.noise.coupling" in failed["log-det of each layer, forward"]


# -- as a user sees it


@pytest.mark.parametrize(
    "model",
    [
        "glow",
        "tarflow preprocess=center",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("realnvp", "nsf_image")),
    ],
)
def test_a_run(model, tmp_path):
    words = [f"model={model.split()[0]}", *model.split()[1:], "dequantize=variational", *TINY]
    config, summary = train_run(tmp_path, *words)
    assert 2 < summary["bits_per_dim"] < 8
    report = evaluation.main(*of_checkpoint(config, summary, tmp_path / "eval", **{**EVAL, "draws": 3}))
    assert report["bits_per_dim_iw"] < report["bits_per_dim"] and report["bits_per_dim_iw_stderr"] > 0
    assert report["log_likelihood_iw"] == pytest.approx(-report["bits_per_dim_iw"] * 64 * math.log(2))
    shown = evaluation.table(report)
    assert f"importance-weighted  {report['bits_per_dim_iw']:.4f} ± {report['bits_per_dim_iw_stderr']:.4f}" in shown
    paths = sample.main(*of_checkpoint(config, summary, tmp_path / "sample", **SAMPLE))
    assert np.load(paths["npy"]).max() <= 16


def weights(run):
    return torch.load(run / "checkpoints/last.pt")["model"]


@pytest.mark.slow
def test_a_run_is_continued_and_repeated(tmp_path):
    words = ["model=glow", "dequantize=variational", *TINY, "threads=1", "compile=false", "scheduler=constant"]
    assert flowtrain(tmp_path, "train", *words, "hydra.run.dir=whole") == 0
    assert flowtrain(tmp_path, "train", *words, "max_steps=2", "hydra.run.dir=run") == 0
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=3") == 0
    assert flowtrain(tmp_path, "rerun", "whole", "hydra.run.dir=again") == 0
    right = weights(tmp_path / "whole")
    assert any("preprocess.dequantize.noise" in name for name in right)
    for name in ("run", "again"):
        found = weights(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in right.items())


def _gradients(folder):
    """Of a half of a batch in each of two processes."""
    rank = torch.distributed.get_rank()
    flow, x = small_flow()
    wrapped = torch.nn.parallel.DistributedDataParallel(flow, broadcast_buffers=False, static_graph=True)
    torch.manual_seed(5)
    with global_batch.rows(4 * rank, 8):
        wrapped(x[4 * rank : 4 * rank + 4]).mean().backward()
    return [parameter.grad for parameter in flow.parameters()]


def small_flow():
    torch.manual_seed(0)
    flow = flows.glow((1, 4, 4), levels=1, steps=1, hidden=4, dropout=0.0, preprocess=partial(CENTER, grey_levels=5))
    x = torch.randint(0, 5, (8, 1, 4, 4))
    perturb(flow, x)
    return flow, x


@pytest.mark.slow
def test_two_processes_get_the_gradient_of_the_whole_batch(tmp_path):
    found, other = run_on_two_ranks(_gradients, tmp_path)
    flow, x = small_flow()
    torch.manual_seed(5)
    with global_batch.rows(0, 8):
        flow(x).mean().backward()
    for one, two, parameter in zip(found, other, flow.parameters(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


def test_flow_matching_takes_uniform_noise():
    flow = flows.cnf_image((1, 4, 4), hidden=4, preprocess=partial(CENTER, grey_levels=5))
    with pytest.raises(ValueError, match="dequantize: flow matching does not train a density"):
        check(flow)


def test_a_figure_in_logit_space_is_one_of_uniform_noise():
    uniform = flows.glow((1, 4, 4), levels=1, steps=1, hidden=4, preprocess=partial(flows.parts.logit, grey_levels=5))
    assert evaluation.links_to_logits(uniform) is uniform.bijection.preprocess
    logit = partial(flows.parts.logit, grey_levels=5, dequantize=VARIATIONAL)
    assert evaluation.links_to_logits(flows.nice((1, 4, 4), hidden=4, preprocess=logit)) is None
