"""TarFlow: attention over tokens, the cache, Jacobi iteration, guidance, and noise that the score takes off."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from audit import assert_exact, event, randomize
from composed import checkpoint_command_config, configuration
from test_commands import EVAL, SAMPLE, TINY, of_checkpoint, train_run

from flowtrain import Flow, flows, nets
from flowtrain import bijections as b
from flowtrain.bijections import decoding
from flowtrain.bijections.decoding import guidance, jacobi
from flowtrain.bijections.noise import with_noise
from flowtrain.commands import eval as evaluation
from flowtrain.commands import sample
from flowtrain.engine.evaluate import without_label
from flowtrain.errors import UsageError
from flowtrain.runtime import global_batch

causal = partial(nets.CausalTransformer, hidden=8, heads=2, depth=2)
made = partial(nets.MADE, hidden=24)
LAYERS = {
    "tokens": partial(b.Autoregressive, (7, 3), b.ExpAffine, causal, order="reversed", context_shape=(3,)),
    "neighbours": partial(b.Autoregressive, (7,), b.ExpAffine, partial(causal, offsets=[1, 3])),
    "masked": partial(b.Autoregressive, (7,), b.RationalQuadratic, made, order="random"),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


def layer_and_context(name, batch=4):
    layer = randomize(LAYERS[name](), scale=0.3)
    context = None if layer.context_shape is None else torch.randn(batch, *layer.context_shape).double()
    return layer, context


def tiny(**keys):
    return randomize(flows.tarflow((2, 4, 6), patch=2, depths=(1, 2), hidden=8, heads=2, **keys))


def test_a_flow_is_exact():
    """Two blocks of two directions, against the autograd Jacobian."""
    assert_exact(tiny().bijection, torch.randn(2, 2, 4, 6).double())


def test_a_token_sees_the_tokens_before_it_and_no_others():
    net = randomize(causal((5, 3), out=2, offsets=[1, 2]), scale=0.3)
    x = torch.randn(4, 5, 3).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), x)  # (5, 3, 2, batch, 5, 3)
    sees = jacobian.abs().sum((1, 2, 3, 5)) > 0
    assert torch.equal(sees, torch.ones(5, 5).tril(-1) > 0)


def test_patches_are_read_row_by_row():
    x = torch.arange(48.0).view(1, 2, 4, 6)
    tokens, _ = b.Patches((2, 4, 6), size=2)(x)
    assert tokens.shape == (1, 6, 8)
    assert torch.equal(tokens[0, 4], x[0, :, 2:4, 2:4].flatten())
    with pytest.raises(ValueError, match="patch=4 must divide the sides of 4×6"):
        b.Patches((2, 4, 6), size=4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_cache_changes_no_number(grad, dtype, tolerance):
    net = randomize(causal((9, 3), out=2, offsets=[1, 4], context_shape=(3,)), scale=0.3).to(dtype)
    x, context = torch.randn(4, 9, 3).to(dtype), torch.randn(4, 3).to(dtype)
    with torch.set_grad_enabled(grad):
        cache, rows, newest = net.init_cache(x, context), [], x[:, :0]
        for i in range(9):
            rows.append(net.step(newest, cache))
            newest = x[:, i : i + 1]
        torch.testing.assert_close(torch.cat(rows, 1), net(x, context), atol=tolerance, rtol=tolerance)


@EVERY
@pytest.mark.parametrize("window", [1, 3, 100])
def test_jacobi_finds_what_steps_find(name, window, monkeypatch):
    monkeypatch.setattr(decoding, "LEAST", window)
    monkeypatch.setattr(decoding, "ENOUGH", 0)
    layer, context = layer_and_context(name)
    z = event(layer, 4)
    x, log_det = layer.inverse(z, context)
    with torch.no_grad(), jacobi(1e-9) as inverses:
        found, found_log_det = layer.inverse(z, context)
    torch.testing.assert_close(found, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found_log_det, log_det, atol=1e-6, rtol=1e-6)
    ((rounds, elements, residual),) = inverses.solves
    assert rounds <= elements == 7 and residual <= 1e-9
    left = (layer(found, context)[0] - z).abs().max().item()
    assert left == pytest.approx(residual, abs=1e-12)  # what it reports is what is left


def test_jacobi_stops_at_its_tolerance():
    layer, context = layer_and_context("tokens")
    z = event(layer, 4)
    counts = []
    for tolerance in (1e3, 1e-1, 1e-12):
        with torch.no_grad(), jacobi(tolerance) as inverses:
            layer.inverse(z, context)
        assert inverses.residual <= tolerance
        counts.append(inverses.solves[0].rounds)
    assert counts[0] == 1 and counts[0] < counts[1] < counts[2]
    with pytest.raises(ValueError, match="tolerance=-1"), jacobi(-1):
        pass


def test_jacobi_reports_what_is_not_finite():
    layer, context = layer_and_context("tokens")
    z = event(layer, 4)
    z[0, -1] = math.inf
    with torch.no_grad(), jacobi() as inverses:
        x, _ = layer.inverse(z, context)
    assert not x[0].isfinite().all() and not inverses.residual <= 1e-4


def test_guidance_is_a_product_of_normal_densities():
    """Up to a constant, log p + w·(log p − log q), where the scale of p is not the greater one."""
    affine = b.ExpAffine((1,))
    theta = torch.tensor([[[0.3, 0.4]]]).double()
    other = torch.tensor([[[-0.5, 0.1]]]).double()
    x = torch.linspace(-3, 3, 7).double()[:, None]

    def log_density(theta):
        z, log_derivative = affine(x, theta.expand(7, 1, 2))
        return (-z.square() / 2 + log_derivative)[:, 0]

    guided = log_density(affine.guide(theta, other, torch.tensor(1.5)))
    expected = log_density(theta) + 1.5 * (log_density(theta) - log_density(other))
    torch.testing.assert_close(guided - guided[0], expected - expected[0])
    assert affine.guide(other, theta, torch.tensor(100.0)).isfinite().all()  # q narrower than p: no product would be
    torch.testing.assert_close(affine.guide(theta, other, torch.tensor(0.0)), theta)
    with pytest.raises(ValueError, match="guidance takes univariate=affine_exp, not Additive"):
        b.Additive((1,)).guide(theta, other, torch.tensor(1.0))


def test_guided_samples_in_steps_and_at_once():
    flow = tiny(context_shape=(3,), hide_context=0.2)
    context = torch.eye(3).double()
    z = flow.latents((), context)
    plain = flow.decode(z, context)
    with guidance(2.0):
        guided = flow.decode(z, context)
    with guidance(2.0), jacobi(1e-9):
        torch.testing.assert_close(flow.decode(z, context), guided, atol=1e-6, rtol=1e-6)
    with guidance(0.0):
        assert torch.equal(flow.decode(z, context), plain)
    assert (guided - plain).abs().amax((1, 2, 3)).min() > 1e-3
    unguided = flow.encode(guided, context)  # densities stay the flow's
    assert not torch.allclose(unguided, z)


def test_contexts_are_hidden_in_training_alone():
    net = nets.HiddenContext((3,), share=0.3, embedding=partial(nets.MLPEmbedding, features=2))
    assert net.out_shape == (2,)
    context = torch.ones(1000, 3)
    torch.manual_seed(0)
    hidden = (net.train()(context) == 0).all(1)
    assert 250 < hidden.sum() < 350
    assert torch.equal(net.eval()(context), net.embedding(context))
    with pytest.raises(ValueError, match="hide_context=1"):
        nets.HiddenContext((3,), share=1.0)


# -- noise


def test_noise_gives_probabilities_of_the_integers():
    """P(x | y), which the log-determinant holds besides q(y | x), sums to one, also outside [−1, 1]."""
    layer = b.AddNoise((1,), grey_levels=6, scale=0.2).double()
    y = torch.linspace(-2, 2, 9).double()[:, None]
    x = torch.arange(6).double().expand(9, 6)
    log_q = torch.distributions.Normal((2 * x + 1) / 6 - 1, 0.2).log_prob(y)
    torch.testing.assert_close((layer._log_ratio(x, y) + log_q).exp().sum(1), torch.ones(9).double())


def test_noise_bounds_the_likelihood_of_the_integers():
    """E[log p] over the noise is at most log ∫ p(y) P(x | y) dy, and their sum over x is one."""
    flow = Flow((1,), partial(b.AddNoise, grey_levels=6, scale=0.2)).double().eval()
    x = torch.arange(6)[:, None]
    with global_batch.examples(torch.arange(6), 0), torch.no_grad():
        bound = torch.stack([flow(x) for _ in range(500)]).mean(0)
    y = torch.linspace(-9, 9, 20001).double()
    layer = flow.bijection
    log_q = torch.distributions.Normal((2 * x + 1) / 6 - 1, 0.2).log_prob(y)
    each = torch.exp(layer._log_ratio(x.double(), y.expand(6, -1)) + log_q - y.square() / 2) / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(each, y)
    assert exact.sum().item() == pytest.approx(1, abs=1e-6)
    assert (bound <= exact.log() + 0.01).all()
    assert (bound > exact.log() - 0.05)[1:-1].all()  # at the ends a normal distribution has more outside


def test_noisy_integers_come_back():
    flow = tiny(preprocess=partial(b.AddNoise, grey_levels=17))
    x = torch.randint(0, 17, (5, 2, 4, 6))
    assert torch.equal(flow.decode(flow.encode(x)), x.to(torch.uint8))
    assert flow.log_prob(x).isfinite().all()
    with pytest.raises(ValueError, match="these are real numbers"):
        b.AddNoise((1,), grey_levels=None)


def test_the_score_takes_the_noise_off():
    """Where y is normal around m with variance v, the mean of the data is y + scale²·(m − y)/v."""
    layers = {
        "noise": partial(b.AddNoise, grey_levels=256, scale=0.3),
        "affine": partial(b.Elementwise, univariate=b.ExpAffine),
    }
    flow = Flow((4,), partial(b.Chain, layers=layers)).double().eval()
    torch.nn.init.constant_(flow.bijection.affine.theta, 0.4)
    z = torch.randn(50, 4).double()
    with with_noise():
        y, _ = flow.bijection.inverse(z)
    variance = math.exp(-0.8)
    clean = y + 0.3**2 * (-0.4 - y) / variance
    expected = ((clean + 1) * 128).floor().clamp(0, 255)
    assert torch.equal(flow.decode(z, denoise=True).double(), expected)
    assert not torch.equal(flow.decode(z), flow.decode(z, denoise=True))
    torch.manual_seed(0)
    noisy = flow.sample(50, denoise=False)
    torch.manual_seed(0)
    assert not torch.equal(flow.sample(50), noisy)
    with pytest.raises(ValueError, match="puts no noise on its data"):
        flows.maf((2,), hidden=8).sample(3, denoise=True)


# -- as a user sees it


def test_likelihoods_without_the_label():
    flow = tiny(context_shape=(3,), preprocess=partial(b.Dequantize, grey_levels=17))
    x, each = torch.randint(0, 17, (4, 2, 4, 6)), []
    for one in torch.eye(3).double():
        with global_batch.examples(torch.arange(4), 5), torch.no_grad():
            each.append(flow(x, one.expand(4, 3)))
    with global_batch.examples(torch.arange(4), 5), torch.no_grad():
        found = without_label(3)(flow, x, torch.eye(3).double()[[0, 1, 2, 0]])
    torch.testing.assert_close(found, torch.stack(each).logsumexp(0) - math.log(3))


def test_a_class_conditional_run_with_noise(tmp_path, caplog):
    words = ["model=tarflow", "preprocess=noise", "preprocess.scale=0.3", "dataset.context=label", "model.patch=2"]
    words += ["model.hide_context=0.5"]
    config, summary = train_run(tmp_path, *words, *TINY, "trainer.sample_n=20")

    def draw(name, **keys):
        return np.load(
            sample.main(*of_checkpoint(config, summary, tmp_path / name, **{**SAMPLE, "n": 2, **keys}))["npy"]
        )

    plain = draw("plain", label="all")
    assert plain.shape == (20, 1, 8, 8)  # two of each class
    assert np.array_equal(draw("list", label=list(range(10))), plain)
    assert not np.array_equal(draw("noisy", label="all", denoise=False), plain)
    with caplog.at_level("INFO", logger="flowtrain"):
        at_once = draw("jacobi", label="all", decoding="jacobi")
    assert (at_once != plain).mean() < 0.01
    assert "Jacobi iteration: " in caplog.text and "residual" in caplog.text
    draw("guided", label=3, guidance=1.0)
    report = evaluation.main(*of_checkpoint(config, summary, tmp_path / "eval", **{**EVAL, "unlabelled": True}))
    assert report["given"] == "label"
    assert report["unlabelled_bits_per_dim"] == pytest.approx(report["bits_per_dim"], abs=0.06)
    assert "bits/dim given the label" in evaluation.table(report) and "without the label" in evaluation.table(report)


@pytest.mark.parametrize(
    ("words", "keys", "says"),
    [
        (["model=nice"], {"decoding": "jacobi"}, "decoding=jacobi: no layer of this model"),
        (["model=nice"], {"denoise": True}, "denoise=true: this model was trained without preprocess=noise"),
        (["model=tarflow", "model.patch=4"], {"guidance": 1.0}, "guidance=1.0: this model never learned without"),
    ],
)
def test_what_a_model_cannot_do_is_refused(words, keys, says, tmp_path):
    config, summary = train_run(tmp_path, *words, *TINY)
    with pytest.raises(UsageError, match=says):
        sample.main(*of_checkpoint(config, summary, tmp_path / "sample", **{**SAMPLE, **keys}))
    if words == ["model=nice"] and "denoise" in keys:
        asked = checkpoint_command_config("eval", config, ckpt=summary["checkpoint"], **{**EVAL, "unlabelled": True})
        with pytest.raises(UsageError, match="unlabelled=true: this model is not class-conditional"):
            evaluation.main(asked, str(tmp_path))


def test_a_histogram_dequantizes_itself():
    flow = flows.tarflow((1, 4, 4), depths=(1, 1), hidden=8, histogram=True, grey_levels=5)
    assert list(flow.bijection.layers()) == ["preprocess", "patches", "block0", "logit", "block1", "flatten"]
    with pytest.raises(ValueError, match="histogram=true takes integers as they are"):
        flows.tarflow((1, 4, 4), histogram=True)
    with pytest.raises(ValueError, match="there is no context to hide"):
        flows.tarflow((1, 4, 4), hide_context=0.1)
    with pytest.raises(ValueError, match="depths=3 must be a list"):
        flows.tarflow((1, 4, 4), depths=3)
    assert configuration("experiment=tarflow_digits").model["histogram"] is True
