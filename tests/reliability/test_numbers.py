"""Promise 11: flows invert exactly when new, when trained and with extreme parameters."""

import copy
import itertools
import math

import pytest
import torch
from composed import ONLY_IMAGES, flow_of, options
from layers import UNIVARIATE
from sklearn.datasets import load_digits

from flowtrain import bijections as b
from flowtrain.bijections.ode import continuous_layers, states_only
from flowtrain.data.spec import DataSpec

LEVELS = 17
GROUPS = {
    "couplings of vectors": ["glow_vector", "nice", "nsf_affine", "nsf_coupling", "realnvp_vector"],
    "autoregressive": ["iaf", "made", "maf", "nsf_autoregressive"],
    "mixtures of normals": ["made_mog", "maf_mog"],
    "continuous": ["cnf", "custom", "ffjord", "hybrid"],
    "images": [
        "autoregressive",
        "flowpp",
        "glow",
        "hybrid_image",
        "jet",
        "nsf_image",
        "pixelcnn",
        "realnvp",
        "tarflow",
    ],
    "continuous, of images": ["cnf_image", "custom_image", "ffjord_image"],
    "residual": ["residual"],
    "residual, of images": ["residual_image"],
}
# examples: rows of 3 numbers, images of 64; roots, fixed points and ODEs cost a hundred times a closed form
EXAMPLES = {
    "couplings of vectors": 1_000_000,
    "autoregressive": 1_000_000,
    "mixtures of normals": 50_000,
    "continuous": 50_000,
    "images": 15_625,
    "continuous, of images": 1_000,
    "residual": 50_000,
    "residual, of images": 1_000,
}


def test_every_model_is_in_a_group():
    assert sorted(model for models in GROUPS.values() for model in models) == options("model")


def draw_rows(n):
    """Draw rows of correlated numbers in four clusters: (n, 3)."""
    x, cluster = torch.randn(n, 3), torch.randint(4, (n, 1))
    mixed = x @ torch.tensor([[0.4, 0.0, 0.0], [0.3, 0.2, 0.0], [-0.1, 0.2, 0.2]]).T
    return mixed + torch.cat([cluster - 1.5, 2.0 * (cluster % 2) - 1, torch.zeros(n, 1)], 1)


def draw_images(n):
    """Draw images of digits: (n, 1, 8, 8)."""
    images = torch.as_tensor(load_digits().images, dtype=torch.uint8)[:, None]
    return images[torch.randint(len(images), (n,))]


def build(model):
    """Build a small flow and initialize it from data; returns it and the function that draws data."""
    small = () if model.startswith("custom") else ("model.hidden=8" if model in ONLY_IMAGES else "model.hidden=16",)
    if model in ONLY_IMAGES:
        flow, draw = flow_of(f"model={model}", "dataset=digits", *small), draw_images
    else:
        flow, draw = flow_of(f"model={model}", "dataset=moons", *small, spec=DataSpec("rows", (3,))), draw_rows
    flow.initialize(draw(256))
    return flow.eval(), draw


def train(flow, draw, steps, rate):
    flow.train()
    optimizer = torch.optim.Adam(flow.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        flow(draw(64)).mean().neg().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 50.0)
        optimizer.step()
    flow.eval()


def bijection_of(flow):
    """The flow's bijection without dequantization, which has no inverse."""
    chain = copy.deepcopy(flow.bijection)
    first = getattr(chain, "preprocess", chain)
    if hasattr(first, "dequantize"):
        del first.dequantize
    return chain


def to_float64(chain):
    """A copy in float64, with strict tolerances for ODE solvers."""
    chain = copy.deepcopy(chain).double()
    for ode in continuous_layers(chain):
        ode.rtol, ode.atol, ode.max_steps = 1e-11, 1e-11, 10 * ode.max_steps
    return chain


@torch.no_grad()
def round_trip_errors(chain, x, batch=8192):
    """|x − f⁻¹(f(x))| of every number, and how many numbers were not finite."""
    found, not_finite = [], 0
    with states_only():
        for part in x.split(batch):
            z, _ = chain(part)
            back, _ = chain.inverse(z)
            not_finite += int((~z.isfinite()).sum() + (~back.isfinite()).sum())
            found.append((back - part).abs().flatten())
    return torch.cat(found), not_finite


def summarize(error):
    """The greatest error and the 99.99 % quantile."""
    return error.max().item(), error.kthvalue(math.ceil(0.9999 * len(error))).values.item()


def measure(chain, x, x64, batch):
    """The greatest error, the 99.99 % quantile, the greatest error in float64, and how many were not finite."""
    error, not_finite = round_trip_errors(chain, x, batch)
    error64, not_finite64 = round_trip_errors(to_float64(chain), x64)
    return *summarize(error), error64.max().item(), not_finite + not_finite64


def assert_exact(measurements):
    """Check the measurements against the promised bounds."""
    for key, (worst, most, worst64, not_finite) in measurements.items():
        assert worst <= 1e-3 and most <= 1e-4 and worst64 <= 1e-8 and not_finite == 0, key


@pytest.mark.parametrize("group", GROUPS)
def test_every_model_inverts_itself(group, count, promise):
    n, steps = count(EXAMPLES[group]), count(50 if "images" in group else 200)
    # five times the default rate makes maps steep; an ODE would then multiply its solver's errors
    rate = 1e-3 if "continuous" in group else 5e-3
    measurements = {}
    for model in GROUPS[group]:
        flow, draw = build(model)
        for state in ("new", "trained"):
            if state == "trained":
                train(flow, draw, steps, rate)
            x = draw(n)
            if x.dtype == torch.uint8:
                x = (x + torch.rand(x.shape)).clamp(max=LEVELS - 1e-5) / LEVELS
            chain = bijection_of(flow)
            measurements[model, state] = measure(chain, x, x[: -(-n // 50)].double(), 8192 if x.dim() == 2 else 512)
    for state in ("new", "trained"):
        each = {model: values for (model, when), values in measurements.items() if when == state}
        worst, most, worst64 = (max(values[i] for values in each.values()) for i in range(3))
        not_finite = sum(values[3] for values in each.values())
        promise(
            11,
            f"{group}, {state}: there and back within 1e-3, 99.99 % 1e-4, float64 1e-8",
            f"{worst:.0e}, {most:.0e}, {worst64:.0e}, not finite {not_finite}; of each of {len(each)}, {n:,} examples",
        )
    assert_exact(measurements)


def test_a_deep_glow_inverts_its_own_samples(count, promise):
    """A Glow with 3 scales of 32 steps of flow."""
    shape = ["dataset=synthetic", "dataset.shape=[3,8,8]", "model.levels=3", "model.steps=32", "model.hidden=8"]
    flow, n = flow_of("model=glow", *shape), count(5_208)  # 10⁶ numbers

    def draw(n):  # smooth, like images
        coarse = torch.rand(n, 3, 2, 2)
        return (255 * torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")).to(torch.uint8)

    flow.initialize(draw(256))
    flow.eval()
    measurements = {}
    for state in ("new", "trained"):
        if state == "trained":
            train(flow, draw, count(50), 1e-3)
        chain = bijection_of(flow)
        with torch.no_grad():
            x = torch.cat([chain.inverse(z)[0] for z in flow.latents(n).split(512)])
            x64 = to_float64(chain).inverse(flow.latents(-(-n // 50)).double())[0]
        measurements[state] = measure(chain, x, x64, 512)
        worst, most, worst64, not_finite = measurements[state]
        promise(
            11,
            f"Glow of 3 levels of 32 steps, {state}: its own samples within 1e-3, 99.99 % 1e-4, float64 1e-8",
            f"{worst:.0e}, {most:.0e}, {worst64:.0e}, not finite {not_finite}; of {n:,} images of 192 numbers",
        )
    assert_exact(measurements)


# ---- extreme parameters: compared with the best float32 result, that of an exact map whose output is rounded once ----

# map -> the standard deviation of its parameters, and how many numbers
HOSTILE = {
    "scale": (50, 1_000_000),
    "exp_affine": (50, 1_000_000),
    "sigmoid_affine": (50, 1_000_000),
    "tanh_affine": (50, 1_000_000),
    "piecewise_linear": (10, 1_000_000),
    "rational_quadratic": (10, 1_000_000),
    "mixture_logistic": (10, 20_000),
    "mixture_normal": (10, 20_000),
}


@torch.no_grad()
def compare_with_best(forward, inverse, forward64, inverse64, x, *theta):
    """The greatest round-trip error, the best possible in float32, and how many numbers are not finite."""
    y, log_forward = forward(x, *theta)
    found, log_inverse = inverse(y, *theta)
    theta64 = [one.double() for one in theta]
    best, _ = inverse64(forward64(x.double(), *theta64)[0].float().double(), *theta64)
    not_finite = sum(int((~numbers.isfinite()).sum()) for numbers in (y, log_forward, found, log_inverse))
    return (found - x).abs().max().item(), (best - x).abs().max().item(), not_finite


@pytest.mark.parametrize("name", HOSTILE)
def test_univariate_maps_are_exact_at_extreme_parameters(name, count, promise):
    deviation, full = HOSTILE[name]
    map, n = UNIVARIATE[name](shape=(1,)), count(full)
    map64 = copy.deepcopy(map).double()
    found = []
    for part in torch.arange(n).split(50_000):
        theta = deviation * torch.randn(len(part), 1, map.params)
        x = torch.rand(len(part), 1)
        x = x if name == "piecewise_linear" else 3.6 * (2 * x - 1)  # [0, 1], or beyond a spline's bounds
        found.append(compare_with_best(map, map.inverse, map64, map64.inverse, x, theta))
    worst, best, not_finite = (combine(column) for combine, column in zip((max, max, sum), zip(*found)))
    promise(
        11,
        f"{name} with parameters of deviation {deviation}: at most 4 times the best of float32, none not finite",
        f"{worst / best:.1f} times ({worst:.1e} to {best:.1e}), not finite {not_finite}; of {n:,} numbers",
    )
    assert worst <= 4 * best and not_finite == 0


def ill_conditioned_matrix(channels):
    """A random matrix of condition number 1e6."""
    left, right = (torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0] for _ in range(2))
    return left * torch.logspace(-3, 3, channels, dtype=torch.float64) @ right


@pytest.mark.parametrize("kind", [b.DenseLinear, b.LULinear])
def test_linear_layers_are_exact_at_condition_a_million(kind, count, promise):
    ratios, done, not_finite = {}, 0, 0
    for channels, pixels in itertools.product((4, 12, 48), ([], [4, 4])):
        for _ in range(5):
            layer = kind((channels, *pixels)).eval()
            layer.set_weight(ill_conditioned_matrix(channels))
            layer64 = copy.deepcopy(layer).double()
            x = torch.randn(count(1_000_000) // 30 // math.prod(layer.shape) + 1, *layer.shape)
            worst, best, bad = compare_with_best(layer, layer.inverse, layer64, layer64.inverse, x)
            ratios[channels] = max(ratios.get(channels, 0.0), worst / best)
            done, not_finite = done + x.numel(), not_finite + bad
    promise(
        11,
        f"{kind.__name__} of condition 1e6: at most 4 times the best of float32, none not finite",
        f"{', '.join(f'{ratio:.1f} times of {channels} channels' for channels, ratio in ratios.items())}, "
        f"not finite {not_finite}; of {done:,} numbers",
    )
    assert max(ratios.values()) <= 4 and not_finite == 0
