"""Invalid and extreme inputs: every model gives the right result, or an error that names the row or shape."""

import math
import re
import time
from collections import Counter

import pytest
import torch
from composed import ONLY_IMAGES, flow_of, options
from layers import UNIVARIATE

from flowtrain import bijections as b
from flowtrain.bijections.ode import exact_trace
from flowtrain.data.spec import DataSpec
from flowtrain.errors import UsageError
from flowtrain.flow import Flow

MODELS = options("model")
LEVELS = 17
B, BAD = 5, 3  # rows, and the one that is changed
SECONDS = 60  # at most, of one call


def width(model: str, hidden: int) -> list[str]:
    """The override for the width of a model's networks; a custom model has several, so none."""
    return [] if model.startswith("custom") else [f"model.hidden={hidden}"]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A small flow away from its neutral start, in evaluation mode, and a batch for it."""
    torch.manual_seed(0)
    if request.param in ONLY_IMAGES:
        spec = DataSpec("small digits", (1, 4, 4), LEVELS)
        flow = flow_of(f"model={request.param}", *width(request.param, 4), spec=spec)
        x = torch.randint(0, LEVELS, (64, 1, 4, 4), dtype=torch.uint8)
    else:
        spec = DataSpec("rows", (3,))
        flow = flow_of(f"model={request.param}", "dataset=moons", *width(request.param, 8), spec=spec)
        x = torch.randn(64, 3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    flow.initialize(x)
    return flow.eval(), x[:B]


@pytest.fixture(scope="module")
def tally(promise):
    """Counts the outcomes of each kind of input, over all models: (kind, "right" or "refused")."""
    outcomes = Counter()
    yield outcomes
    kinds = sorted({kind for kind, _ in outcomes})
    right, refused = (sum(n for (_, end), n in outcomes.items() if end == which) for which in ("right", "refused"))
    promise(
        11,
        f"{len(kinds)} awkward inputs to each of {len(MODELS)} models: right, or a ValueError with the row or shape",
        f"{right + refused} of {right + refused}: {right} right, {refused} refused ({', '.join(kinds)})",
    )


def log_prob(flow, x):
    """The log-likelihood with the same noise each time and the exact trace of an ODE, within ``SECONDS``."""
    torch.manual_seed(1)
    start = time.monotonic()
    try:
        with torch.no_grad(), exact_trace():
            return flow.log_prob(x)
    finally:
        assert time.monotonic() - start < SECONDS


def assert_right_or_refused(tally, kind, message, attempt, check=lambda result: None):
    """Check that ``attempt()`` is finite and passes ``check``, or raises an error that matches ``message``."""
    try:
        result = attempt()
    except (ValueError, UsageError) as error:
        assert re.search(message, str(error))
        tally[kind, "refused"] += 1
        return
    assert result.isfinite().all()
    check(result)
    tally[kind, "right"] += 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20])
def test_values_that_are_huge_or_not_finite_are_right_or_refused(case, value, tally):
    flow, x = case
    x = x.float().clone()
    x[BAD].view(-1)[0] = value
    alone = x[BAD : BAD + 1]

    def check_in_float64(result):  # a number this large has a likelihood if float32 can hold it
        flow.double()
        try:
            torch.testing.assert_close(result[BAD:].double()[:1], log_prob(flow, alone.double()), rtol=1e-3, atol=1e-3)
        finally:
            flow.float()

    assert_right_or_refused(tally, f"{value:g}", f"row {BAD} of x", lambda: log_prob(flow, x), check_in_float64)
    if not math.isfinite(value):
        with pytest.raises(ValueError, match=f"row {BAD} of x holds a number that is not finite"):
            flow.encode(x)
        z = torch.zeros(B, *flow.bijection.out_shape)
        z[BAD, 0] = value
        with pytest.raises(ValueError, match=f"row {BAD} of z holds a number that is not finite"):
            flow.decode(z)


def test_huge_latents_are_right_or_refused(case, tally):
    flow, _ = case
    z = torch.zeros(B, *flow.bijection.out_shape)
    z[BAD, 0] = 1e20
    assert_right_or_refused(tally, "latents of 1e20", f"row {BAD} of z", lambda: flow.decode(z))


def test_values_at_knots_and_bounds_come_back(case, tally):
    """At bounds of splines and their neighbours, knots of equal bins, and the least and greatest grey levels."""
    flow, x = case
    if x.dtype == torch.uint8:
        ends = [0, 1, LEVELS - 2, LEVELS - 1]
        x = torch.stack([torch.full_like(x[0], value) for value in ends])
    else:
        ends = [0.0, 1.0, -1.0, 3.0, -3.0, 0.75, 2.25, -1.5, 3.0000002, 2.9999998]
        x = torch.stack([torch.full_like(x[0], value) for value in ends])
    result = log_prob(flow, x)
    assert result.isfinite().all()
    back = flow.decode(flow.encode(x))
    if x.dtype == torch.uint8:
        assert torch.equal(back, x)
    else:
        torch.testing.assert_close(back, x, rtol=0, atol=1e-3)
    tally["bounds and 0 and 1", "right"] += 1


def test_a_value_that_is_no_grey_level_is_refused(case, tally):
    flow, x = case
    if x.dtype != torch.uint8:
        return
    for value in (-1.0, 0.5, float(LEVELS), 300.0):
        wrong = x.float()
        wrong[BAD, 0, 2, 2] = value
        with pytest.raises(ValueError, match=f"row {BAD} of x"):
            log_prob(flow, wrong)
    tally["no integer of the data", "refused"] += 1


@pytest.mark.filterwarnings("ignore:var_mean")  # of an empty batch in training
def test_empty_batches_and_batches_of_one_work(case, tally):
    flow, x = case
    for training in (False, True):
        flow.train(training)
        try:
            assert log_prob(flow, x[:0]).shape == (0,)
        finally:
            flow.eval()
    assert flow.encode(x[:0]).shape == (0, *flow.bijection.out_shape)
    assert flow.decode(flow.latents(0)).shape == flow.sample(0).shape == (0, *flow.shape)
    if x.dtype != torch.uint8:  # the noise of images depends on the batch
        torch.testing.assert_close(log_prob(flow, x[:1]), log_prob(flow, x)[:1], rtol=1e-4, atol=1e-3)
    assert log_prob(flow, x[:1]).isfinite().all() and flow.sample(1).shape == (1, *flow.shape)
    for kind in ("empty", "batch of one"):
        tally[kind, "right"] += 1


def test_a_batch_need_not_be_contiguous(case, tally):
    flow, x = case
    scattered = torch.empty(B, *x.shape[:0:-1], dtype=x.dtype).permute(0, *range(x.dim() - 1, 0, -1))
    scattered = torch.stack([scattered, scattered], -1)[..., 0].copy_(x)
    assert not scattered.is_contiguous()
    torch.testing.assert_close(log_prob(flow, scattered), log_prob(flow, x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(flow.encode(scattered), flow.encode(x), rtol=1e-4, atol=1e-4)
    tally["not contiguous", "right"] += 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_every_dtype_has_the_likelihood_of_float32(case, dtype, tally):
    flow, x = case
    x = x.float().abs().clamp(max=1).round() if dtype in (torch.uint8, torch.int64, torch.bool) else x.half()
    expected = log_prob(flow, x.float())
    result = log_prob(flow, x.to(dtype))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    tally[str(dtype).removeprefix("torch."), "right"] += 1


def test_a_flow_in_float64_agrees_with_float32(case, tally):
    flow, x = case
    single = log_prob(flow, x) if x.dtype != torch.uint8 else None
    flow.double()
    try:
        result = log_prob(flow, x)
        assert result.dtype == torch.float64 and result.isfinite().all()
        if single is not None:
            torch.testing.assert_close(result, single.double(), rtol=1e-4, atol=1e-3)
        assert flow.sample(2).isfinite().all()
    finally:
        flow.float()
    tally["a flow in float64", "right"] += 1


def test_wrong_shapes_are_refused(case, tally):
    flow, x = case
    wrong_events = (x[..., :-1], x.unsqueeze(-1), x.flatten(), torch.zeros(()), torch.zeros(0), torch.zeros(B, 99))
    for call, wrongs in {flow: (x[0], x.unsqueeze(1)), flow.log_prob: (), flow.encode: ()}.items():
        for wrong in (*wrongs, *wrong_events):
            with pytest.raises(ValueError, match="events of shape"):
                call(wrong)
    for wrong in (torch.zeros(B, flow.dimensions + 1), torch.zeros(flow.dimensions + 1), torch.zeros(())):
        with pytest.raises(ValueError, match="events of shape"):
            flow.decode(wrong)
    with pytest.raises(ValueError, match="complex"):
        flow.log_prob(x.to(torch.complex64))
    tally["wrong shape", "refused"] += 1


@pytest.mark.parametrize("model", MODELS)
def test_one_dimension_is_right_or_refused(model, tally):
    if model in ONLY_IMAGES:
        dataset, spec, x = "digits", DataSpec("pixels", (1, 1, 1), LEVELS), torch.randint(0, LEVELS, (B, 1, 1, 1))
    else:
        dataset, spec, x = "moons", DataSpec("numbers", (1,)), torch.randn(B, 1)

    def attempt():
        flow = flow_of(f"model={model}", f"dataset={dataset}", *width(model, 8), spec=spec)
        flow.initialize(x)
        result = log_prob(flow.eval(), x)
        torch.testing.assert_close(flow.decode(flow.encode(x)).to(x.dtype), x, rtol=0, atol=1e-4)
        return result

    assert_right_or_refused(tally, "D = 1", "shape|1×1|sides that are odd", attempt)


@pytest.mark.parametrize("name", ["piecewise_linear", "rational_quadratic"])
def test_a_spline_is_inverted_at_every_knot(name):
    """At the knots of a thousand splines and the nearest numbers on both sides."""
    spline, theta = UNIVARIATE[name](shape=(1,)), torch.randn(1000, 1, 14)
    if name == "piecewise_linear":
        theta, low, high = theta[..., :5], 0.0, 1.0
        knots = torch.linspace(low, high, 6).expand(1000, -1)
    else:
        low, high = -spline.bound, spline.bound
        widths = spline.least[0] + spline.share[0] * theta[:, 0, :5].softmax(-1)
        knots = torch.cat([torch.zeros(1000, 1), widths.cumsum(-1)], -1) + low
    for x in knots.unbind(1):
        for near in (x, x.nextafter(x + 1), x.nextafter(x - 1), torch.full_like(x, low), torch.full_like(x, high)):
            y, log_there = spline(near[:, None], theta)
            back, log_back = spline.inverse(y, theta)
            assert log_there.isfinite().all() and log_back.isfinite().all()
            torch.testing.assert_close(back, near[:, None], rtol=0, atol=1e-3)


# ---- contexts, singular matrices and ODEs without a solution ----------------------------


def test_a_wrong_context_is_refused():
    flow = flow_of("model=maf", "dataset=digits", "dataset.context=label", "model.hidden=8").eval()
    x, context = torch.zeros(B, 1, 8, 8), torch.eye(10)[:B]
    assert flow.log_prob(x, context.double()).isfinite().all()
    for wrong in (None, context[:2], context[:, :3]):
        with pytest.raises(ValueError, match="context"):
            flow.log_prob(x, wrong)
    context[BAD, 0] = math.nan
    with pytest.raises(ValueError, match=f"row {BAD} of context"):
        flow.log_prob(x, context)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
def test_a_singular_matrix_is_refused(shape):
    flow = Flow(shape, b.DenseLinear).eval()
    flow.bijection.set_weight(torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="row 0 of x, .*has no log-likelihood that is finite"):
        flow.log_prob(torch.ones(B, *shape))
    with pytest.raises(ValueError, match="row 0 of z, .*has no inverse that is finite"):
        flow.decode(torch.ones(B, *shape))


class Explosive(torch.nn.Module):
    """dx/dt = x² from 0 to 1, which has no solution for x ≥ 1."""

    def __init__(self, shape, context_shape=None):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.ones(()))

    def forward(self, t, x, context=None):
        return self.rate * x.square()


def test_an_ode_without_a_solution_names_the_row():
    flow = Flow((1,), lambda **shapes: b.Continuous(net=Explosive, **shapes)).eval()
    x = torch.tensor([[0.1], [-5.0], [0.5], [2.0], [0.2]])
    start = time.monotonic()
    with pytest.raises(ValueError, match="row 3 of x, .*an ODE .*came to"):
        flow.encode(x)
    assert time.monotonic() - start < SECONDS
    expected = x[:3] / (1 - x[:3])
    torch.testing.assert_close(flow.encode(x[:3]), expected, rtol=1e-4, atol=1e-4)
