"""Mixtures as univariate maps: their definition, their density under a logistic base, hostile parameters, gradients."""

import math

import pytest
import torch
from torch import distributions as d

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.distributions import Logistic
from flowtrain.flow import Flow

MIXTURES = {"logistic": b.MixtureLogistic((1,)), "normal": b.MixtureNormal((1,))}
EVERY = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
EPS = torch.finfo(torch.float32).eps


def draws(mixture, scale, n, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = scale * torch.randn(n, mixture.params, generator=generator, dtype=dtype)
    return 3 * torch.randn(n, generator=generator, dtype=dtype), theta


def torchs(mixture, theta, kind):
    """The mixture that θ stands for, in torch.distributions."""
    logits, mean, raw = theta[..., : 3 * mixture.components].chunk(3, -1)
    mean = mean + mixture.means
    variance = {"logistic": math.pi**2 / 3, "normal": 1.0}[kind]
    spread = torch.linspace(-1, 1, mixture.components, dtype=torch.float64).square().mean()
    scale = ((math.pi**2 / 3 - spread) / variance).sqrt() * (7 * torch.tanh(raw / 7)).exp()
    if kind == "normal":
        component = d.Normal(mean, scale)
    else:
        component = d.TransformedDistribution(
            d.Uniform(torch.zeros_like(mean), 1), [d.SigmoidTransform().inv, d.AffineTransform(mean, scale)]
        )
    return d.Categorical(logits=logits), component


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_map_is_the_logit_of_the_distribution_function(kind):
    mixture = MIXTURES[kind]
    x, theta = draws(mixture, 0.5, 10_000, torch.float64)
    weights, component = torchs(mixture, theta, kind)
    cdf = (weights.probs * component.cdf(x[:, None])).sum(-1)
    density = (weights.logits + component.log_prob(x[:, None])).logsumexp(-1)
    y, log_derivative = mixture(x, theta)
    if kind == "logistic":
        bounded = 7 * torch.tanh(theta[:, -2] / 7)
        y, log_derivative = (y - theta[:, -1]) * (-bounded).exp(), log_derivative - bounded
    middle = (cdf - 0.5).abs() < 0.49
    assert middle.sum() > 8000
    torch.testing.assert_close(y[middle], torch.logit(cdf)[middle], atol=1e-10, rtol=1e-10)
    base = Logistic((1,)).log_prob(y[:, None])
    torch.testing.assert_close(base + log_derivative, density, atol=1e-10, rtol=1e-10)


def test_an_autoregressive_layer_on_a_logistic_base_is_made_with_mixtures_of_gaussians():
    torch.manual_seed(0)
    layer = b.Autoregressive((4,), b.MixtureNormal, lambda **kwargs: nets.MADE(hidden=16, **kwargs))
    flow = Flow((4,), lambda **_: layer, Logistic).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = 2 * torch.randn(200, 4, dtype=torch.float64)
    weights, component = torchs(layer.univariate, layer.net(x), "normal")
    expected = d.MixtureSameFamily(weights, component).log_prob(x).sum(-1)
    torch.testing.assert_close(flow.log_prob(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("kind", "near", "log_slope"), [("logistic", 0.041, 0.05), ("normal", 0.15, 0.19)])
def test_theta_zero_is_nearly_the_identity_of_components_that_differ(kind, near, log_slope):
    mixture = MIXTURES[kind]
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    theta = torch.zeros(301, mixture.params, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mixture.means, torch.linspace(-1, 1, mixture.components))
    y, log_derivative = mixture(x, theta)
    assert (y - x).abs().max() < near and log_derivative.abs().max() < log_slope
    (y.square() / 2 - log_derivative).sum().backward()
    for gradient in theta.grad.sum(0)[: 3 * mixture.components].chunk(3):
        pairs = (gradient[:, None] - gradient).abs().fill_diagonal_(1)
        assert pairs[: mixture.components // 2, : mixture.components // 2].min() > 1e-3  # the others mirror these


@EVERY
@pytest.mark.parametrize(("scale", "n"), [(1, 10_000), (10, 100_000), (30, 10_000)])
def test_the_inverse_is_exact_at_hostile_parameters(mixture, scale, n):
    """Within a few roundings of x lies a point whose image, in float64, is within a few roundings of y."""
    x, theta = draws(mixture, scale, n)
    components = mixture._components(theta[:, : 3 * mixture.components])
    exact = type(components)(*(part.double() for part in components))
    y = mixture._map(x.double(), exact)[0].float()
    generator = torch.Generator().manual_seed(1)
    y[::2] = torch.randn(n // 2, generator=generator) * 10 ** (4 * torch.rand(n // 2, generator=generator))
    root = mixture._root(y, components).double()
    low, high = (mixture._map(root + way * 2 * EPS * root.abs(), exact)[0] for way in (-1, 1))
    near = 4 * EPS * (1 + y.abs())
    assert ((low - near <= y) & (y <= high + near)).all()
    # and with float64 numbers the root is one of float64
    root = mixture._root(y[:1000].double(), type(exact)(*(part[:1000] for part in exact)))
    image = mixture._map(root, type(exact)(*(part[:1000] for part in exact)))[0]
    assert ((image - y[:1000]).abs() / (1 + y[:1000].abs())).max() < 1e-8


@EVERY
def test_round_trip_as_good_as_y_can_carry_it(mixture):
    x, theta = draws(mixture, 1, 10_000)
    back = mixture.inverse(mixture(x, theta)[0], theta)[0]
    rounded = mixture(x.double(), theta.double())[0].float().double()
    error, best = (back - x).abs().double(), (mixture.inverse(rounded, theta.double())[0] - x).abs()
    for quantile in (0.5, 0.9, 0.99, 0.999, 1):
        assert error.quantile(quantile) <= 4 * best.quantile(quantile) + EPS, quantile


@EVERY
@pytest.mark.parametrize("scale", [10, 1e12])
def test_all_is_finite_at_hostile_parameters(mixture, scale):
    x, theta = draws(mixture, scale, 1000)
    for run in (mixture.forward, mixture.inverse):
        x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
        y, log_derivative = run(x, theta)
        (y.sum() + log_derivative.sum()).backward()
        for values in (y, log_derivative, x.grad, theta.grad):
            assert values.isfinite().all()


@EVERY
def test_large_values(mixture):
    x, theta = 1e4 * draws(mixture, 1, 1000)[0], draws(mixture, 1, 1000)[1]
    y, log_derivative = mixture(x, theta)
    back, inverse_log_derivative = mixture.inverse(y, theta)
    for values in (y, log_derivative, inverse_log_derivative):
        assert values.isfinite().all()
    torch.testing.assert_close(back, x, atol=0, rtol=1e-5)


@EVERY
def test_gradients_against_finite_differences(mixture):
    small = type(mixture)((1,), components=3)
    x, theta = draws(small, 1, 8, torch.float64)
    for run in (small.forward, small.inverse):
        assert torch.autograd.gradcheck(run, (x.requires_grad_(), theta.requires_grad_()))


def test_tails_of_the_normal_distribution():
    mixture = MIXTURES["normal"]
    far = torch.logspace(-6, 5, 4001, dtype=torch.float64)
    z = torch.cat((-far, torch.zeros(1, dtype=torch.float64), far)).requires_grad_()
    below, above = mixture.log_tails(z)
    torch.testing.assert_close(below, torch.special.log_ndtr(z), atol=1e-300, rtol=1e-12)
    torch.testing.assert_close(above, torch.special.log_ndtr(-z), atol=1e-300, rtol=1e-12)
    hazard = math.sqrt(2 / math.pi) / torch.special.erfcx(-z.detach() / math.sqrt(2))
    (gradient,) = torch.autograd.grad(below.sum(), z)
    torch.testing.assert_close(gradient, hazard, atol=1e-300, rtol=1e-9)
    single = z.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_tails(single)[0].sum(), single)
    torch.testing.assert_close(gradient.double(), hazard, atol=1e-30, rtol=2e-5)


def test_bounds_of_the_normal_quantile():
    p = torch.logspace(-300, math.log10(0.5), 2001, dtype=torch.float64)
    y, z = torch.logit(p), torch.special.ndtri(p)
    low, high = MIXTURES["normal"].quantile(y)
    assert (low <= z + 1e-12).all() and (z - 1e-12 <= high).all() and (high - low).max() < 0.8
    mirrored_low, mirrored_high = MIXTURES["normal"].quantile(-y)
    assert torch.equal(mirrored_low, -high) and torch.equal(mirrored_high, -low)


@pytest.mark.parametrize("kind", [b.MixtureLogistic, b.MixtureNormal])
@pytest.mark.parametrize("wrong", [{"components": 0}, {"bound": 0.0}], ids=str)
def test_refusals_name_the_argument(kind, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        kind((1,), **wrong)
