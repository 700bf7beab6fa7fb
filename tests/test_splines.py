"""Rational-quadratic splines: other people's code, hostile parameters, gradients; the model of images made of them."""

import math

import pytest
import torch
from audit import assert_exact, randomize
from torch.nn import functional as F

from flowtrain import bijections as b
from flowtrain import flows

BINS, BOUND = 8, 3.0
FLOOR = 1e-3
N = 100_000


@pytest.fixture(scope="module")
def spline():
    return b.RationalQuadratic((1,), bins=BINS, bound=BOUND)


def draws(scale, n=N, dtype=torch.float64, bins=BINS):
    """θ and x: some in the tails, some at the bounds, some at the knots of θ (so far as a number can be)."""
    generator = torch.Generator().manual_seed(0)
    theta = scale * torch.randn(n, 3 * bins - 1, generator=generator, dtype=dtype)
    x = 1.2 * BOUND * (2 * torch.rand(n, generator=generator, dtype=dtype) - 1)
    x[:6] = torch.tensor([-BOUND, BOUND, -1e4, 1e4, 0.0, BOUND * (1 - 1e-7)])
    edges = BOUND * (2 * shares(theta[:, :bins]).cumsum(-1) - 1)
    x[6 : n // 50] = edges[6 : n // 50, bins // 2 - 1].clamp(-BOUND, BOUND)
    return x, theta


def shares(logits):
    return FLOOR + (1 - FLOOR * logits.shape[-1]) * logits.softmax(-1)


def theirs(x, theta, inverse=False):
    """nflows' spline, whose slope parameter 0 does not mean a slope of 1."""
    nflows = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    widths, heights, slopes = theta.split([BINS, BINS, BINS - 1], -1)
    return nflows.unconstrained_rational_quadratic_spline(
        x, widths, heights, slopes + math.log(math.expm1(1 - FLOOR)), inverse=inverse, tails="linear", tail_bound=BOUND
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_theta_zero_is_the_identity(spline, dtype):
    x, _ = draws(1, 5000, dtype)
    for run in (spline.forward, spline.inverse):
        y, log_derivative = run(x, torch.zeros(len(x), spline.params, dtype=dtype))
        precision = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, x, atol=precision, rtol=0)
        torch.testing.assert_close(log_derivative, torch.zeros_like(x), atol=precision, rtol=0)


@pytest.mark.parametrize("scale", [0.3, 2])
def test_against_nflows(spline, scale):
    x, theta = draws(scale)
    for run, inverse in ((spline.forward, False), (spline.inverse, True)):
        # what x and θ lose by rounding is magnified by as much as the slope, up to some 1,000
        for ours, reference in zip(run(x, theta), theirs(x, theta, inverse)):
            torch.testing.assert_close(ours, reference, atol=1e-7, rtol=1e-9)


def test_in_float32_not_less_exact_than_nflows(spline):
    x, theta = draws(1, dtype=torch.float32)
    exact = spline(x.double(), theta.double())
    for ours, reference, truth in zip(spline(x, theta), theirs(x, theta), exact):
        assert (ours - truth).abs().mean() < 1.2 * (reference - truth).abs().mean()


def test_against_zuko(spline):
    transforms = pytest.importorskip("zuko.transforms")
    x, theta = draws(2)
    widths, heights, slopes = theta.split([BINS, BINS, BINS - 1], -1)
    slopes = FLOOR + F.softplus(slopes + math.log(math.expm1(1 - FLOOR)))
    # zuko bends its parameters so that no slope is below 1e-30: unbend the logarithms that are wanted
    bend = -math.log(1e-30)
    sizes = [log / (1 - 2 * log.abs() / bend) for log in (shares(widths).log(), shares(heights).log())]
    slopes = slopes.log() / (1 - slopes.log().abs() / bend)
    reference = transforms.MonotonicRQSTransform(*sizes, slopes, bound=BOUND, slope=1e-30)
    y, log_derivative = reference.call_and_ladj(x)
    inside = x.abs() < BOUND - 1e-6  # beyond, the rounding of zuko's last knot decides
    for ours, other in zip(spline(x, theta), (y, log_derivative)):
        torch.testing.assert_close(ours[inside], other[inside], atol=1e-7, rtol=1e-9)
    torch.testing.assert_close(spline.inverse(y, theta)[0][inside], reference.inv(y)[inside], atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("bins", [2, 8, 32])
def test_hostile_parameters(bins):
    """Logits of standard deviation 10, on which nflows stops at its assertion."""
    spline = b.RationalQuadratic((1,), bins=bins)
    x, theta = draws(10, dtype=torch.float32, bins=bins)
    y, log_derivative = spline(x, theta)
    back, inverse_log_derivative = spline.inverse(y, theta)
    for values in (y, log_derivative, back, inverse_log_derivative):
        assert values.isfinite().all()
    # as good as a map without error whose output is rounded to float32
    reference = spline.inverse(spline(x.double(), theta.double())[0].float().double(), theta.double())[0]
    error, best = (back - x).abs().double(), (reference - x).abs()
    for quantile in (0.5, 0.9, 0.99, 0.999, 1):
        assert error.quantile(quantile) <= 4 * best.quantile(quantile) + 3e-7, quantile
    assert error.mean() < 1.3 * best.mean()
    x, theta = draws(30, bins=bins)
    assert (spline.inverse(spline(x, theta)[0], theta)[0] - x).abs().max() < 1e-6


def test_monotone_at_hostile_parameters(spline):
    _, theta = draws(10, 100, torch.float32)
    x = torch.linspace(-1.1 * BOUND, 1.1 * BOUND, 2500)[:, None].expand(-1, 100)
    for run in (spline.forward, spline.inverse):
        y, _ = run(x, theta.expand(2500, 100, -1))
        assert (y.diff(dim=0) >= -1e-6).all()  # of values up to 3: a few roundings
    y, _ = spline(x.double(), theta.double().expand(2500, 100, -1))
    assert (y.diff(dim=0) > 0).all()


@pytest.mark.parametrize("scale", [10, 1e30])
def test_gradients_are_finite_at_hostile_parameters(spline, scale):
    x, theta = draws(scale, 10_000, torch.float32)
    for run in (spline.forward, spline.inverse):
        x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
        y, log_derivative = run(x, theta)
        (y.sum() + log_derivative.sum()).backward()
        for values in (y, log_derivative, x.grad, theta.grad):
            assert values.isfinite().all()


def test_gradients_against_finite_differences(spline):
    _, theta = draws(1, 12)
    x = torch.linspace(-3.6, 3.6, 12, dtype=torch.float64)
    for run in (spline.forward, spline.inverse):
        assert torch.autograd.gradcheck(run, (x.requires_grad_(), theta.requires_grad_()))


def test_in_the_middle_of_a_bin_the_inverse_has_its_gradient(spline):
    """There the root's two forms meet: with θ = 0 that is at every bin's centre."""
    y = torch.linspace(-BOUND, BOUND, 2 * BINS + 1, dtype=torch.float64)[1::2].requires_grad_()
    theta = torch.zeros(BINS, spline.params, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spline.inverse, (y, theta))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bins": 1},
        {"bound": 0.0},
        {"min_width": 0.0},
        {"min_height": 0.125},
        {"min_derivative": 1.0},
    ],
    ids=str,
)
def test_refusals_name_the_argument(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        b.RationalQuadratic((1,), **wrong)


@pytest.mark.parametrize(("scales", "channels"), [(flows.parts.single_scale, [4, 16]), (b.MultiScale, [4, 8])])
def test_neural_spline_flow_of_images(scales, channels):
    flow = flows.nsf_image((1, 8, 8), levels=2, steps=1, hidden=4, scales=scales)
    couplings = [layer for layer in flow.modules() if isinstance(layer, b.Coupling)]
    assert [layer.shape[0] for layer in couplings] == channels
    layers = randomize(flow.bijection.scales, scale=0.03)
    assert layers.out_shape == (64,)
    assert_exact(layers, 0.3 * torch.randn(2, 1, 8, 8, dtype=torch.float64))


def test_the_first_half_moves_and_the_second_sets_how():
    """As in the reference code, on whose parameter counts the presets' depend."""
    flow = flows.nsf_image((3, 8, 8), steps=1, hidden=4)
    coupling = randomize(next(layer for layer in flow.modules() if isinstance(layer, b.Coupling)))
    x = 0.5 * torch.randn(2, *coupling.shape, dtype=torch.float64)
    z, _ = coupling(x)
    half = coupling.shape[0] // 2
    assert torch.equal(z[:, half:], x[:, half:]) and not (z[:, :half] == x[:, :half]).any()
