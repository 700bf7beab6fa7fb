"""Whole flows: that their probabilities add up, that bits/dim is what it says, that nothing is lost on the way."""

import math
import threading
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from audit import assert_exact, randomize
from layers import LAYERS, conv, glow_step, mlp, residual

from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.distributions import Logistic, StandardNormal
from flowtrain.flow import Flow, to_bits_per_dim
from flowtrain.runtime import fusion, global_batch


def preprocess(levels, alpha):
    last = {"center": b.Center} if alpha is None else {"logit": partial(b.Logit, alpha=alpha)}
    return partial(b.Chain, layers={"dequantize": partial(b.Dequantize, grey_levels=levels), **last})


def image_flow(shape, levels=256, alpha=None, body=None):
    layers = {"preprocess": preprocess(levels, alpha), "body": body or b.Flatten}
    return Flow(shape, partial(b.Chain, layers=layers))


@pytest.fixture
def noise(monkeypatch):
    """Set what dequantization draws."""

    def set_noise(values):
        monkeypatch.setattr(global_batch, "uniform", lambda shape, **_: values.expand(shape))

    return set_noise


# ---- probabilities -------------------------------------------------------------------------------------------------

two_pixels = partial(
    b.Chain,
    layers={
        "mixing": b.LULinear,
        "flatten": b.Flatten,
        "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=mlp),
        "other": partial(b.Coupling, univariate=b.TanhAffine, net=mlp, partition=partial(b.Halves, swap=True)),
        "scale": partial(b.Elementwise, univariate=b.ExpAffine),
    },
)


def mass(flow, levels, noise, nodes=48):
    """Σ over all images of ∫ p(x + ε) dε, by Gauss-Legendre quadrature in float64."""
    at, weight = np.polynomial.legendre.leggauss(nodes)
    at, weight = torch.tensor((at + 1) / 2), torch.tensor(weight / 2)
    noise(torch.cartesian_prod(at, at).view(-1, 2, 1, 1))
    weight = torch.cartesian_prod(weight, weight).prod(1)
    total = 0.0
    for x in product(range(levels), repeat=2):
        images = torch.tensor(x).view(1, 2, 1, 1).expand(len(weight), -1, -1, -1)
        total += (flow(images).exp() * weight).sum().item()
    return total


@pytest.mark.parametrize("body", [None, two_pixels], ids=["identity", "flow"])
def test_probabilities_of_all_images_sum_to_one(body, noise):
    flow = randomize(image_flow((2, 1, 1), levels=4, alpha=0.0, body=body), scale=0.3)
    assert mass(flow, 4, noise) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("alpha", "inside"), [(0.05, 0.9935), (None, 0.1466)])
def test_probabilities_sum_to_the_mass_inside_the_cube(alpha, inside, noise):
    identity = randomize(image_flow((2, 1, 1), levels=4, alpha=alpha))
    assert mass(identity, 4, noise) == pytest.approx(inside, abs=1e-4)

    flow = randomize(image_flow((2, 1, 1), levels=4, alpha=alpha, body=two_pixels), scale=0.3)
    y = flow.latents(400_000, generator=torch.Generator().manual_seed(0))
    for layer in [*flow.bijection.body][::-1] + [*flow.bijection.preprocess][:0:-1]:
        y = layer.inverse(y)[0]
    unclamped = ((y >= 0) & (y < 1)).flatten(1).all(1).double().mean().item()
    assert mass(flow, 4, noise) == pytest.approx(unclamped, abs=3e-3)


@pytest.mark.parametrize("base", [StandardNormal, Logistic])
def test_densities_integrate_to_one(base):
    at = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    line = randomize(Flow((1,), partial(b.Elementwise, univariate=b.ExpAffine), base))
    assert torch.trapezoid(line(at[:, None]).exp(), at).item() == pytest.approx(1, abs=1e-6)

    at = torch.linspace(-16, 16, 801, dtype=torch.float64)
    chain = partial(
        b.Chain, layers={"linear": b.LULinear, "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=mlp)}
    )
    plane = randomize(Flow((2,), chain, base))
    density = plane(torch.cartesian_prod(at, at)).exp().view(801, 801)
    assert torch.trapezoid(torch.trapezoid(density, at), at).item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("base", [StandardNormal, Logistic])
def test_base_samples_follow_their_density(base):
    from scipy import stats

    distribution = base((3,))
    reference = {StandardNormal: stats.norm, Logistic: stats.logistic}[base]
    z = distribution.sample(20_000, 0.7, generator=torch.Generator().manual_seed(0))
    assert stats.kstest(z.flatten().numpy() / 0.7, reference.cdf).pvalue > 1e-3
    torch.testing.assert_close(distribution.log_prob(z), torch.tensor(reference.logpdf(z).sum(1), dtype=z.dtype))
    assert Logistic((2,)).log_prob(torch.tensor([[1e4, -1e4]])).isfinite().all()


# ---- bits per dimension --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.05])
def test_bits_per_dim_against_an_independent_computation(bits, alpha, noise):
    levels, shape = 2**bits, (3, 4, 4)
    rng = np.random.default_rng(0)
    x, u = rng.integers(0, levels, (5, *shape)), rng.uniform(size=(5, *shape))
    noise(torch.tensor(u))
    flow = image_flow(shape, levels, alpha).double()

    y = (x + u) / levels  # in numpy, from the definitions
    if alpha is None:
        latent, slope = y - 0.5, np.ones_like(y)
    else:
        p = alpha + (1 - 2 * alpha) * y
        latent, slope = np.log(p / (1 - p)), (1 - 2 * alpha) / (p * (1 - p))
    log_prob = (-0.5 * latent**2 - 0.5 * math.log(2 * math.pi) + np.log(slope)).sum((1, 2, 3))
    expected = -log_prob / (48 * math.log(2)) + bits
    np.testing.assert_allclose(flow.bits_per_dim(torch.tensor(x)).numpy(), expected, rtol=1e-12)


def test_uniform_codes_are_log2_levels():
    assert to_bits_per_dim(torch.tensor(-64 * math.log(17.0)), 64).item() == pytest.approx(4.0875, abs=1e-4)


# ---- nothing is lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantized_values_stay_in_their_bin(dtype, noise):
    edge = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    for levels in range(2, 257):
        x = torch.arange(levels)[:, None]
        layer = b.Dequantize((1,), levels).to(dtype)
        for u in (torch.zeros((), dtype=dtype), edge):
            noise(u)
            y, log_det = layer(x)
            assert ((y >= 0) & (y < 1)).all(), levels
            back, inverse_log_det = layer.inverse(y)
            assert (back == x).all(), levels
            assert back.dtype == torch.uint8
            torch.testing.assert_close(log_det, -inverse_log_det)


def test_logit_is_finite_at_the_ends():
    for alpha in (0.0, 1e-6, 0.05):
        layer = b.Logit((1,), alpha)
        z, log_det = layer(torch.tensor([[0.0], [1.0], [1 - 2**-24]]))
        assert z.isfinite().all() and log_det.isfinite().all()


def test_logit_of_what_lies_outside_is_no_number():
    """Clamped, many points would share a latent, and the density would not integrate to one."""
    z, log_det = b.Logit((1,), 0.0)(torch.tensor([[-0.1], [1.1]]))
    assert z.isnan().all() and log_det.isnan().all()


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_logit_is_exact(alpha):
    x = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_exact(b.Logit((3,), alpha), x)


def multiscale_flow(alpha=None, levels=3):
    body = partial(
        b.MultiScale,
        levels=levels,
        level=partial(b.Chain, layers={"squeeze": b.Squeeze, "step": glow_step}),
        split_prior=partial(b.Conditional, univariate=b.ExpAffine, net=nets.ZeroConv),
    )
    return image_flow((3, 8, 8), 256, alpha, body)


@pytest.mark.parametrize("alpha", [None, 0.05])
def test_encode_then_decode_returns_the_very_integers(alpha):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    flow = multiscale_flow(alpha)
    flow.initialize(x)
    z = flow.encode(x)
    assert z.shape == (200, 192)
    assert torch.equal(flow.decode(z), x)


def test_every_latent_depends_on_every_pixel():
    torch.manual_seed(0)
    flow = randomize(multiscale_flow())
    body = flow.bijection.body
    total = 0
    for seed in range(3):
        x = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        total = total + torch.autograd.functional.jacobian(lambda x: body(x)[0].sum(0), x).abs().flatten(1)
    last_level = total[-12 * 4 :]  # what left earlier has seen fewer couplings
    assert (last_level > 0).float().mean() > 0.9
    assert (total.sum(0) > 0).all() and (total.sum(1) > 0).all()


# ---- the start from data -------------------------------------------------------------------------------------------


def test_initialize_standardizes_every_actnorm_once():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    flow = multiscale_flow()
    flow.initialize(x)
    seen = []
    norms = [module for module in flow.modules() if isinstance(module, b.ActNorm | nets.ActNorm)]
    for module in norms:
        assert module.started
        # a copy: a network's rectifier writes in place
        module.register_forward_hook(
            lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
        )

    def run():
        seen.clear()
        torch.manual_seed(5)
        with fusion.layer_by_layer():
            flow(x)
        return list(seen)

    before = run()
    assert len(before) == len(norms)
    flow.initialize(x[:8])  # started already: nothing changes
    run()
    torch.testing.assert_close(seen, before, rtol=0, atol=0)
    for out in before:
        std, mean = torch.std_mean(out.flatten(2), (0, 2), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=0.2, rtol=0)
        torch.testing.assert_close(std, torch.ones_like(std), atol=0.2, rtol=0)


@pytest.mark.parametrize("layer", [b.LULinear, b.DenseLinear])
def test_whitening_starts_from_data(layer):
    x = torch.randn(500, 3, 2, 2) @ torch.randn(2, 2) * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    for wrap in (partial(layer, start="whitening"), partial(b.Inverse, bijection=partial(layer, start="whitening"))):
        flow = Flow((3, 2, 2), partial(b.Chain, layers={"actnorm": b.ActNorm, "linear": wrap, "flatten": b.Flatten}))
        flow.initialize(x)
        z = flow.bijection(x)[0].unflatten(1, (3, 4)).movedim(1, 2).flatten(0, 1)
        torch.testing.assert_close(torch.cov(z.T), torch.eye(3), atol=1e-3, rtol=0)
    torch.manual_seed(1)
    other = Flow((3, 2, 2), partial(b.Chain, layers={"actnorm": b.ActNorm, "linear": wrap, "flatten": b.Flatten}))
    other.load_state_dict(flow.state_dict())
    other.initialize(3 * x)  # loaded: started already
    torch.testing.assert_close(other(x), flow(x))


def test_an_inverted_actnorm_starts_too():
    x = 3 * torch.randn(500, 4) + 2
    flow = Flow((4,), partial(b.Inverse, bijection=b.ActNorm))
    flow.initialize(x)
    z = flow.bijection(x)[0]
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)


def test_a_started_actnorm_stays_started_after_loading():
    flow = Flow((4,), b.ActNorm)
    flow.initialize(torch.randn(50, 4))
    other = Flow((4,), b.ActNorm)
    other.load_state_dict(flow.state_dict())
    before = other.state_dict()["bijection.bias"].clone()
    other.initialize(torch.randn(50, 4) + 9)
    assert torch.equal(other.bijection.bias, before)


def test_a_constant_channel_starts_finite():
    flow = Flow((2,), b.ActNorm)
    x = torch.cat((torch.randn(50, 1), torch.full((50, 1), 3.0)), 1)
    flow.initialize(x)
    assert flow(x).isfinite().all()


# ---- threads -------------------------------------------------------------------------------------------------------


class Meeting(b.Bijection):
    """Waits in ``forward`` until another thread has arrived there too."""

    barrier = threading.Barrier(2, timeout=60)

    def forward(self, x, context=None):
        self.barrier.wait()
        return x, torch.zeros(len(x))


def test_threads_use_a_flow_in_modes_of_their_own():
    """``encode`` maps integers to the centres of their bins and integrates no trace; ``log_prob`` does neither."""
    layers = {
        "first": Meeting,
        "dequantize": partial(b.Dequantize, grey_levels=4),
        "ode": partial(b.Continuous, net=partial(nets.ODENet, hidden=4, depth=1), solver="rk4"),
        "second": Meeting,
    }
    flow, x = Flow((2,), partial(b.Chain, layers=layers)), torch.randint(0, 4, (50, 2))
    found = {}

    def run(name):
        found[name] = getattr(flow, name)(x)

    for _ in range(2):  # both have passed the first layer before either enters the second one
        threads = [threading.Thread(target=run, args=(name,)) for name in ("encode", "log_prob")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(found["encode"], (x + 0.5) / 4)  # the ODE is the identity at its start
        assert found["log_prob"].isfinite().all()
        centre = StandardNormal((2,)).log_prob(found["encode"]) - 2 * math.log(4)
        assert not torch.allclose(found["log_prob"], centre)


# ---- the global batch ----------------------------------------------------------------------------------------------


def test_slices_of_a_global_batch_draw_its_noise():
    torch.manual_seed(0)
    whole = global_batch.uniform((6, 2))
    for start, stop in ((0, 3), (3, 6), (2, 4)):
        torch.manual_seed(0)
        with global_batch.rows(start, 6):
            assert torch.equal(global_batch.uniform((stop - start, 2)), whole[start:stop])


def test_batchnorm_evaluates_with_remembered_moments():
    torch.manual_seed(0)
    layer = b.BatchNorm((3, 2, 2))
    batches = [2 * torch.randn(16, 3, 2, 2) + 1 for _ in range(4)]
    layer.train()
    z, log_det = layer(batches[0])
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    with global_batch.reestimate(layer):
        for x in batches:
            layer(x)
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running.mean, mean)
    layer.eval()
    z, _ = layer(batches[1])
    torch.testing.assert_close(layer.inverse(z)[0], batches[1], atol=1e-5, rtol=1e-5)


def test_batchnorm_in_training_is_exact_for_the_batch_it_sees():
    """The log-determinant is that of the map with the batch's moments held fixed, as the papers define it."""
    layer = b.BatchNorm((2,)).double().train()
    x = torch.randn(8, 2, dtype=torch.float64)
    _, log_det = layer(x)
    expected = -0.5 * (x.var(0, correction=0) + layer.eps).log().sum()
    torch.testing.assert_close(log_det, expected.expand(8))


def test_a_bad_batch_leaves_no_trace_in_the_moments():
    layer = b.BatchNorm((2,)).train()
    layer(torch.full((4, 2), math.nan))
    assert layer.running.mean.isfinite().all() and layer.running.var.isfinite().all()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Flow((1, 7, 8), partial(b.Chain, layers={"squeeze": b.Squeeze})), "squeeze: sides of 7×8"),
        (lambda: b.Halves((1, 4, 4)), "no two halves"),
        (lambda: b.Checkerboard((4,)), "needs images"),
        (lambda: b.Chain((4,), {"a": b.ActNorm}, order=["b"]), "order must name each layer once"),
        (lambda: b.Chain((4,), {"a": b.ActNorm}, order=["a", "a"]), "order must name each layer once"),
        (lambda: b.Chain((4,), {"forward": b.ActNorm}), "cannot be named 'forward'"),
        (lambda: b.Chain((4,), {"a": b.ActNorm}, repeat=0), "repeat=0"),
        (lambda: b.MultiScale((4, 4, 4), 2, {"level0": b.Squeeze}), "needs level1"),
        (lambda: b.Inverse((4, 4, 4), b.Squeeze), "keeps its shape"),
        (lambda: b.Inverse((4,), partial(b.Dequantize, grey_levels=4)), "not a surjection"),
        (lambda: b.Dequantize((4,), None), "needs integer data; these are real numbers"),
        (lambda: b.Dequantize((4,), 1), "levels=1"),
        (lambda: b.Logit((4,), 0.5), "alpha=0.5"),
        (lambda: b.Permutation((3,), [0, 1, 1]), "each of the 3 channels"),
        (lambda: b.LULinear((3,), "orthogonal"), "start='orthogonal'"),
        (lambda: b.Conditional((2,), b.ExpAffine, mlp), "needs a context"),
        (lambda: nets.MLP((1, 2, 2), 4), "takes vectors"),
        (lambda: conv(shape=(4,), out=2), "takes images"),
        (lambda: residual(shape=(4, 2, 2), out=2, context_shape=(2, 2)), "takes a context vector"),
        (lambda: nets.Dropout(1.0), "dropout=1.0"),
        (lambda: conv(shape=(1, 2, 2), out=2, hidden=-3), "hidden=-3 must be at least 1"),
        (lambda: nets.MLP((4,), 2, depth=0), "depth=0 must be at least 1"),
        (lambda: nets.CausalTransformer((4,), 2, hidden=6), "hidden=6 is not a multiple of heads=4"),
        (lambda: nets.CausalTransformer((4,), 2, offsets=[0]), "cannot see itself"),
        (lambda: b.PiecewiseLinear((4,), bins=1), "bins=1"),
        (lambda: b.Autoregressive((4,), b.TanhAffine, nets.CausalTransformer), "TanhAffine has weights of its own"),
    ],
)
def test_constructors_name_what_they_refuse(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"takes \[3, 8, 8\]"):
        multiscale_flow()(torch.zeros(2, 3, 4, 4))


def test_a_context_is_refused_where_the_flow_takes_none():
    flow, context = flows.maf((2,), hidden=4), torch.zeros(3, 9)
    for method in (flow.log_prob, flow.bits_per_dim, flow.encode, flow.decode, partial(flow.sample, context=context)):
        with pytest.raises(ValueError, match="this flow takes no context"):
            method(3) if isinstance(method, partial) else method(torch.zeros(3, 2), context)


@pytest.mark.parametrize("shape", [5, (0,), (-1, 2), (2.5,), "ab", ()])
@pytest.mark.parametrize("make", [flows.maf, partial(flows.realnvp, levels=1), flows.glow, b.ActNorm])
def test_a_shape_is_a_sequence_of_positive_integers(make, shape):
    with pytest.raises(ValueError, match="shape must be a sequence of positive integers"):
        make(shape)


def test_attention_over_pixels_takes_images():
    with pytest.raises(ValueError, match="takes images"):
        flows.autoregressive((3,), grey_levels=5)


def test_dropout_evaluates_as_the_identity_and_keeps_the_mean():
    x = torch.ones(1000, 8)
    layer = nets.Dropout(0.25)
    assert layer(x).mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glow_step", "checkerboard", "multiscale"])
def test_compiled_layers_give_the_same_numbers(name):
    torch.manual_seed(0)
    layer = randomize(LAYERS[name]()).float()
    x = torch.randn(3, *layer.shape)
    torch.testing.assert_close(torch.compile(layer)(x), layer(x), atol=1e-4, rtol=1e-4)


def test_many_rows_pass_in_parts_and_give_what_each_would_alone(monkeypatch):
    torch.manual_seed(0)
    flow = flows.nsf_coupling((3,), hidden=8, context_shape=(2,)).eval()
    randomize(flow)
    x, context, sizes = torch.randn(1000, 3, dtype=torch.float64), torch.randn(1000, 2), []
    with torch.no_grad():
        whole = flow.log_prob(x, context), flow.encode(x, context), flow.decode(x, context)
        monkeypatch.setattr("flowtrain.flow.ROWS_AT_ONCE", 300)
        flow.bijection.register_forward_hook(lambda _layer, inputs, _out: sizes.append(len(inputs[0])))
        parts = flow.log_prob(x, context), flow.encode(x, context), flow.decode(x, context)
        for one, other in zip(whole, parts):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert sizes == [300, 300, 300, 100] * 2
        x[700, 1] = 1e200
        with pytest.raises(ValueError, match="row 700 of x, .* has no log-likelihood that is finite"):
            flow.log_prob(x, context)
        with global_batch.examples(torch.arange(1000), 1):
            flow.encode(x, context)
        assert sizes[-1] == 1000
    flow.log_prob(x[:500].requires_grad_(), context[:500])
    assert sizes[-1] == 500
