"""Bounded data: exact densities, and no sample outside, in Python and from the command line."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from audit import jacobian_log_det, randomize
from composed import flow_of
from inprocess import flowtrain
from torch.distributions import Dirichlet, LogisticNormal, LogNormal, biject_to, constraints

import flowtrain as library
from flowtrain import bijections as b
from flowtrain import flows, nets
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.bijections.interval import SLOPE
from flowtrain.bijections.support import support_of
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.data.spec import DataSpec
from flowtrain.data.tables.column import Column
from flowtrain.engine.audit import audit, perturb
from flowtrain.errors import UsageError

SUPPORTS = {
    "unit": partial(b.Box, (3,)),
    "wide": partial(b.Box, (3,), low=-1e4, high=[1e4, 3.0, 0.0]),
    "narrow": partial(b.Box, (3,), low=1000.1, high=1000.7),
    "odd": partial(b.Box, (3,), low=0.1, high=0.3),
    "mixed": partial(b.Box, (4,), low=[0.0, None, -2.0, None], high=[1.0, 5.0, None, None]),
    "below": partial(b.Box, (2,), low=None, high=0.0),
    "image": partial(b.Box, (2, 3, 3), low=-1.0),
    "positive": partial(b.Positive, (3,)),
    "pair": partial(b.Simplex, (2,)),
    "simplex": partial(b.Simplex, (5,)),
    "shares": partial(b.Simplex, (100,)),
}
EVERY = pytest.mark.parametrize("name", SUPPORTS)


def latents(layer, n=64, scale=2.0, dtype=torch.float64, seed=0):
    return scale * torch.randn(n, *layer.out_shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_strictly_inside(layer, x):
    if isinstance(layer, b.Simplex):
        assert (x > 0).all() and (x < 1).all()
        assert ((x.double().sum(1) - 1).abs() < max(1e-6, x.shape[1] * torch.finfo(x.dtype).eps)).all()
    else:
        low, high = layer.bounds
        assert (x.double() > low).all() and (x.double() < high).all()
    assert x.isfinite().all() and layer.contains(x).all() and layer.constraint.check(x).all()


@EVERY
def test_both_directions_and_their_log_dets(name):
    layer = SUPPORTS[name]().double()
    z = latents(layer, 4)
    x, inverse_log_det = layer.inverse(z)
    back, log_det = layer(x)
    torch.testing.assert_close(back, z, atol=1e-7, rtol=1e-7)  # a narrow box far from 0 rounds its data
    forward = lambda free, context: layer(layer.lift(free))
    inverse = lambda z, context: (layer.free(layer.inverse(z)[0]), None)
    torch.testing.assert_close(log_det, jacobian_log_det(forward, layer.free(x), None), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(inverse_log_det, jacobian_log_det(inverse, z, None), atol=1e-8, rtol=1e-8)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_latent_leads_outside(name, dtype):
    layer = SUPPORTS[name]().to(dtype)
    ends = torch.tensor([0.0, 1e-30, 1, 16, 17, 36, 37, 88, 89, 103, 104, 200, 709, 746, 1e4, 1e30], dtype=dtype)
    grid = torch.cat((ends, -ends)).view(-1, *[1] * len(layer.out_shape)).expand(-1, *layer.out_shape)
    for z in (grid, grid * torch.linspace(-1, 1, layer.out_shape[-1], dtype=dtype), latents(layer, 1000, 10, dtype)):
        x, log_det = layer.inverse(z)
        assert_strictly_inside(layer, x)
        assert log_det.isfinite().all()
        assert all(part.isfinite().all() for part in layer(x))  # so a sample has a density


@EVERY
def test_gradients_are_finite_at_the_ends(name):
    layer = SUPPORTS[name]()
    z = (1e4 * latents(layer, 16, 1, torch.float32)).requires_grad_()
    x, log_det = layer.inverse(z)
    gradients = torch.autograd.grad(x.sum() + log_det.sum(), z)
    x = x.detach().requires_grad_()
    z, log_det = layer(x)
    assert all(one.isfinite().all() for one in (*gradients, *torch.autograd.grad(z.sum() + log_det.sum(), x)))


@EVERY
def test_autocast_and_copies(name):
    layer = SUPPORTS[name]()
    z = latents(layer, 8, 1, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, log_det = layer.inverse(z)
        back, back_log_det = layer(x)
    assert {one.dtype for one in (x, log_det, back, back_log_det)} == {torch.float32}
    torch.testing.assert_close(copy.deepcopy(layer)(x), (back, back_log_det), rtol=0, atol=0)
    assert not layer.state_dict()


def test_bounds_are_rounded_once():
    layer = b.Box((1,), low=0.1, high=0.3)
    for dtype in (torch.float64, torch.float32, torch.float64):
        layer = layer.to(dtype)
        x = torch.tensor([[0.1], [0.3]], dtype=dtype)
        assert layer.contains(x).all() and layer.low.dtype == dtype
    assert layer.low.item() == 0.1
    with torch.device("meta"):
        assert b.Box((1,)).low.is_meta


def test_points_outside_have_no_density():
    for layer, inside, outside in (
        (b.Box((2,)), [[0.0, 1.0], [0.5, 0.2]], [[-1e-6, 0.5], [0.5, 1.0001], [torch.nan, 0.5]]),
        (b.Box((2,), high=None), [[1e-30, 1e30]], [[0.0, 1.0], [-1.0, 1.0]]),
        (b.Positive((2,)), [[1e-37, 5.0]], [[0.0, 1.0]]),
        (b.Simplex((2,)), [[0.0, 1.0], [0.3, 0.7]], [[-0.1, 1.1], [0.3, 0.6]]),
    ):
        inside, outside = torch.tensor(inside), torch.tensor(outside)
        assert layer.contains(inside).all() and not layer.contains(outside).any()
        z, log_det = layer(inside)
        assert z.isfinite().all() and log_det.isfinite().all() and layer(outside)[0].isnan().any(1).all()
        assert [layer.explain(x) for x in inside] == [None] * len(inside)
        assert all(layer.explain(x) for x in outside)
        assert layer.constraint.check(inside).all()
    assert not b.Positive((2,)).constraint.check(torch.tensor([[0.0, 1.0]]))


def test_values_next_to_a_bound_keep_all_their_digits():
    x = torch.tensor([[1e-30, -1e-30]], dtype=torch.float32)
    layer = b.Box((2,), low=[0.0, -1.0], high=[1.0, 0.0])
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b.Box((2,), low=1, high=1), "low=1 must be below high=1"),
        (lambda: b.Box((2,), low=1, high=1 + 1e-8), "must be below .* float32 resolves"),
        (lambda: b.Box((2,), low=[0, 0, 0]), r"low=\[0, 0, 0\] must be a number or null, or 2 of them"),
        (lambda: b.Box((2,), high="x"), "high=x must be a number"),
        (lambda: b.Box((2,), high=torch.nan), "high=nan must be"),
        (lambda: b.Box((2,), low=torch.inf, high=None), "low=inf must be"),
        (lambda: b.Simplex((1,)), r"at least 2 numbers, not \[1\]"),
        (lambda: b.Simplex((2, 2)), "at least 2 numbers"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- against torch.distributions


def test_the_inside_of_a_box_is_a_line_and_its_edges_are_logarithms():
    ends = [1e-3, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999]
    x = torch.tensor(ends, dtype=torch.float64)[:, None].requires_grad_()
    layer = b.Box((1,)).double()
    z, log_det = layer(x)
    below = [0.1 + 0.1 * math.log(gap / 0.1) - 0.5 for gap in (1e-3, 0.05)]
    expected = [*below, -0.4, -0.2, 0, 0.2, 0.4, -below[1], -below[0]]
    torch.testing.assert_close(z.flatten() / SLOPE, torch.tensor(expected, dtype=torch.float64))
    (slope,) = torch.autograd.grad(z.sum(), x)  # also where the pieces meet
    torch.testing.assert_close(slope.log().flatten(), log_det)
    z = z.detach().requires_grad_()
    back, log_det = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(back.sum(), z)[0].log().flatten(), log_det)
    with torch.no_grad():
        z, _ = layer(torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)).double())
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_a_normal_of_logarithms_is_torchs_log_normal():
    flow = library.Flow((3,), b.Positive).double()
    x = LogNormal(0.0, 1.0).sample((50, 3)).double()
    torch.testing.assert_close(flow(x), LogNormal(torch.zeros(3).double(), 1.0).log_prob(x).sum(1))
    torch.testing.assert_close(b.Positive((3,)).double().inverse(x)[0], biject_to(constraints.positive)(x))


def test_two_shares_are_torchs_logistic_normal():
    """Of two numbers the stick-breaking of torch is the log-ratio, but for their order."""
    flow = library.Flow((2,), b.Simplex).double()
    x = torch.tensor([[0.2, 0.8], [0.9, 0.1]]).double()
    torch.testing.assert_close(
        flow(x),
        LogisticNormal(torch.zeros(1).double(), torch.ones(1).double()).log_prob(x),
        rtol=1e-6,
        atol=1e-6,
    )


def test_shares_have_the_density_of_torchs_dirichlet():
    """Dirichlet(1, …, 1) is constant, (K − 1)!, on the simplex: so is the density of its log-ratios' image."""
    layer = b.Simplex((4,)).double()
    x = Dirichlet(torch.ones(4).double()).sample((50,))
    z, log_det = layer(x)
    log_density_of_z = Dirichlet(torch.ones(4).double()).log_prob(x) - log_det
    expected = torch.lgamma(torch.tensor(4.0)).double() + torch.nn.functional.pad(z, (0, 1)).log_softmax(1).sum(1)
    torch.testing.assert_close(log_density_of_z, expected)


# ---- in flows


def moved(flow, *inputs):
    torch.manual_seed(0)
    perturb(flow, *inputs)
    return flow.eval()


def inside(layer, n=8):
    return layer().inverse(latents(layer(), n, 1, torch.float32))[0]


@pytest.mark.parametrize(("name", "free"), [("unit", 1), ("unit", 2), ("odd", 2), ("simplex", 2)])
def test_densities_integrate_to_one(name, free):
    shape = (free + 1,) if name == "simplex" else (free,)
    kind, bounds = SUPPORTS[name].func, SUPPORTS[name].keywords
    first = partial(kind, **bounds)
    flow = flows.nsf_autoregressive(shape, steps=2, hidden=8, preprocess=first)
    moved(flow, first(shape=shape).inverse(torch.randn(64, free))[0])
    low, high = bounds.get("low", 0.0), bounds.get("high", 1.0)
    side = 20_000 if free == 1 else 400
    axis = low + (high - low) * (torch.arange(side) + 0.5) / side
    points = torch.cartesian_prod(*[axis] * free).view(-1, free)
    if name == "simplex":
        points = points[points.sum(1) < 1 - 1e-6]
    with torch.no_grad():
        mass = flow(support_of(flow.bijection).lift(points)).double().exp().sum() * ((high - low) / side) ** free
    assert abs(mass - 1) < 6e-3


@pytest.mark.parametrize("name", ["unit", "mixed", "positive", "simplex"])
def test_the_audit_passes(name):
    first = SUPPORTS[name]
    flow = flows.nsf_coupling(first.args[0], pairs=1, hidden=8, preprocess=partial(first.func, **first.keywords))
    x = inside(first, 16)
    moved(flow, x)
    found = list(audit(flow, x))
    assert all(check.passed for check in found), [check for check in found if not check.passed]


@pytest.mark.parametrize("kind", [partial(b.Box, (2,), high=[1.0, 3.0]), partial(b.Simplex, (3,))])
def test_the_audit_measures_the_mass(kind):
    flow = flows.nsf_coupling(kind.args[0], pairs=1, hidden=8, preprocess=partial(kind.func, **kind.keywords))
    x = inside(kind, 16)
    moved(flow, x)
    (check,) = [check for check in audit(flow, x) if check.name == "mass of the density"]
    assert check.passed


@pytest.mark.parametrize(
    ("first", "x"),
    [
        (b.Box, [[0.0, 1.0, 0.5], [1.0, 0.3, 0.0], [0.2, 0.3, 0.4]]),
        (b.Simplex, [[0.0, 0.4, 0.6], [0.3, 0.7, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_the_audit_passes_on_data_with_values_on_the_edge(first, x):
    flow = flows.nsf_coupling((3,), pairs=1, hidden=8, preprocess=first)
    moved(flow, inside(partial(first, (3,))))
    found = list(audit(flow, torch.tensor(x)))
    assert all(check.passed for check in found), [check for check in found if not check.passed]


class Wrong(b.Simplex):
    """With the log-determinant of a density on all K numbers."""

    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return z, log_det + x[:, -1].log()


def test_the_audit_finds_a_wrong_log_det_on_the_simplex():
    flow = flows.nsf_coupling((4,), pairs=1, hidden=8, preprocess=Wrong)
    x = inside(partial(b.Simplex, (4,)), 16)
    moved(flow, x)
    assert not all(check.passed for check in audit(flow, x))


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
@pytest.mark.parametrize("name", ["unit", "positive", "simplex"])
def test_gradients_are_the_same_in_every_memory_mode(name, memory):
    first = SUPPORTS[name]
    flow = flows.nsf_coupling(first.args[0], hidden=8, preprocess=partial(first.func, **first.keywords)).double()
    x = inside(first).double()
    if name == "simplex":
        x = x / x.sum(1, keepdim=True)
    moved(flow, x)
    found = []
    for mode in ("none", memory):
        flow.set_backpropagation(MEMORY_MODES[mode]())
        flow.zero_grad()
        flow(x).mean().backward()
        found.append([parameter.grad.clone() for parameter in flow.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SUPPORTS)
def test_no_sample_is_outside(name, dtype):
    first = SUPPORTS[name]
    shape = first.args[0]
    if len(shape) == 3:
        pytest.skip("a flow of images")
    flow = flows.maf(shape, steps=2, hidden=8, norm=b.ActNorm, preprocess=partial(first.func, **first.keywords))
    flow = randomize(flow, 0.5).to(dtype)
    for temperature in (1.0, 10.0, 1e4):
        x = flow.sample(500, temperature=temperature)
        assert_strictly_inside(support_of(flow.bijection), x)
    assert flow.log_prob(flow.sample(500)).isfinite().all()


@pytest.mark.parametrize(
    ("first", "x", "message"),
    [
        (
            b.Box,
            [[0.5, 0.5, 0.5], [0.5, 1.2, 0.5]],
            r"row 1 of x.* outside the support.* number 1 is 1.2, outside \[0, 1\]",
        ),
        (b.Positive, [[0.0, 1.0, 1.0]], r"row 0 of x.* number 0 is 0, outside \(0, inf\)"),
        (b.Simplex, [[0.3, 0.3, 0.3]], r"row 0 of x.* the sum is 0.9, not 1; divide by it"),
        (b.Simplex, [[0.6, 0.6, -0.2]], r"row 0 of x.* number 2 is -0.2, below 0"),
    ],
)
def test_a_row_outside_is_named_with_the_support(first, x, message):
    flow = flows.maf((3,), hidden=8, preprocess=first).eval()
    for method in (flow.log_prob, flow.encode):
        with pytest.raises(ValueError, match=message) as caught:
            method(torch.tensor(x))
        assert "\n" not in str(caught.value)


def test_a_box_of_images():
    flow = flows.glow((1, 8, 8), levels=1, steps=1, hidden=4, preprocess=b.Box)
    x = flow.sample(20, temperature=1e3)
    assert (x > 0).all() and (x < 1).all() and flow.log_prob(x).isfinite().all()


def test_a_conditional_flow_on_a_simplex():
    embedding = partial(nets.MLPEmbedding, features=4, hidden=8)
    flow = flows.nsf_autoregressive((3,), hidden=8, context_shape=(2,), embedding=embedding, preprocess=b.Simplex)
    assert_strictly_inside(b.Simplex((3,)), flow.sample(100, context=torch.zeros(2)))


# ---- from a configuration


@pytest.mark.parametrize(
    ("words", "columns", "message"),
    [
        (["preprocess=box", "preprocess.low=2"], None, "^preprocess: support: low=2 must be below high=1"),
        (
            ["preprocess=box", "preprocess.low=[0,0,0]"],
            None,
            r"^preprocess: support: low=\[0, 0, 0\] must be",
        ),
        (
            ["preprocess=simplex"],
            (Column("x", "real"), Column("n", "integer")),
            "^preprocess: simplex takes real columns; 'n'",
        ),
        (
            ["preprocess=box"],
            (Column("x", "real", missing=True), Column("y", "real")),
            "'x' is real with missing values",
        ),
    ],
)
def test_what_is_refused(words, columns, message):
    spec = DataSpec("table", (2,), columns=columns)
    with pytest.raises(UsageError, match=message):
        flow_of("model=maf", "dataset=moons", *words, spec=spec)


def test_integers_are_refused():
    with pytest.raises(UsageError, match="^preprocess: box takes real numbers; these are integers from 0 to 16"):
        flow_of("model=glow", "dataset=digits", "preprocess=box")


def test_training_examples_outside_are_refused():
    rows = torch.tensor([[0.5], [2.0], [3.0]])
    with pytest.raises(ValueError, match=r"2 of 3 training examples are outside; of the first, number 0 is 2"):
        b.Box((1,)).fit(None, rows)
    far = SimpleNamespace(encoded=[Column("t", "real", offset=1e9)])
    with pytest.raises(ValueError, match="column 't' is far from 0"):
        b.Box((1,)).fit(far, rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounded")
    random = np.random.default_rng(0)
    pd.DataFrame(random.dirichlet([0.5, 1, 2], 300), columns=list("abc")).to_csv(folder / "shares.csv", index=False)
    np.save(folder / "unit.npy", np.clip(random.beta(0.3, 0.3, (300, 2)), 0, 1).astype(np.float32))
    np.save(folder / "outside.npy", random.normal(size=(300, 2)))
    return folder


SMALL = ("model=realnvp_vector", "model.hidden=8", "max_steps=5", "report=false")


def test_a_table_of_shares(folder):
    words = ("dataset=table", "dataset.path=shares.csv", "preprocess=simplex", "hydra.run.dir=shares")
    assert flowtrain(folder, "train", *SMALL, *words) == 0
    assert flowtrain(folder, "eval", "ckpt=shares") == 0
    words = ("ckpt=shares", "n=500", "temperature=10", "hydra.run.dir=of_shares")
    assert flowtrain(folder, "sample", *words) == 0
    samples = pd.read_csv(folder / "of_shares/samples.csv")
    assert ((samples > 0) & (samples < 1)).to_numpy().all() and (samples.sum(axis=1) - 1).abs().max() < 1e-5


def test_an_array_between_bounds(folder):
    words = ("dataset=arrays", "dataset.path=unit.npy", "preprocess=box", "preprocess.low=[0,0]", "hydra.run.dir=unit")
    assert flowtrain(folder, "train", *SMALL, *words) == 0
    assert flowtrain(folder, "sample", "ckpt=unit", "n=500", "temperature=100", "hydra.run.dir=of_unit") == 0
    samples = np.load(folder / "of_unit/samples.npy")
    assert samples.shape == (500, 2) and (samples > 0).all() and (samples < 1).all()


def test_a_run_on_data_outside_is_refused(folder):
    words = ("dataset=arrays", "dataset.path=outside.npy", "preprocess=positive")
    with pytest.raises(WorkerError, match="preprocess: Positive: .* training examples are outside") as caught:
        flowtrain(folder, "train", *SMALL, *words)
    assert "\n" not in str(caught.value)
