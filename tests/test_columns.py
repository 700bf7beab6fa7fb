"""The links of a table, from the values of its columns to real numbers: exact, and the density that they say."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from audit import assert_exact, randomize
from composed import ONLY_IMAGES, flow_of, options
from scipy import stats

from flowtrain import bijections as b
from flowtrain import flows
from flowtrain.bijections.columns import fit_to_columns
from flowtrain.bijections.ode import exact_trace
from flowtrain.data.spec import ColumnContext, DataSpec
from flowtrain.data.split import ArraySplit
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.columns import Columns
from flowtrain.distributions import Joint, Logistic
from flowtrain.engine.audit import _count_changes, audit
from flowtrain.engine.divergence import examine
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.flows import parts
from flowtrain.flows.angles import with_angles
from flowtrain.runtime import global_batch
from flowtrain.training.start import fit_to_data


def fit(layer, columns, rows=None):
    """``layer``, a factory or a bijection, fitted to columns and rows."""
    columns = columns if isinstance(columns, Columns) else Columns(tuple(columns))
    count = len(columns.encoded)
    layer = layer if isinstance(layer, b.Bijection) else layer((count,))
    fit_to_columns(layer, columns, torch.zeros(2, count) if rows is None else rows)
    return layer


# ---- bounds


BOUNDED = (
    Column("share", "real", mean=0.3, std=0.1, low=0.0, high=1.0),
    Column("price", "real", mean=5.0, std=2.0, low=2.0),
    Column("plain", "real", mean=5.0, std=2.0),
    Column("debt", "real", mean=-3.0, std=2.0, high=0.7),
    Column("count", "integer", mean=4.0, std=2.0, low=0.0, high=9.0),
)
INSIDE = torch.tensor([[0.25, 2.5, -70.0, 0.1, 3.0], [0.99, 90.0, 1.0, -20.0, 0.0]], dtype=torch.float64)


def test_bounds_are_exact_in_both_directions():
    assert_exact(fit(b.BoundColumns, BOUNDED, INSIDE).double(), INSIDE)


def test_bounds_map_only_real_columns_that_have_them():
    z, _ = fit(b.BoundColumns, BOUNDED, INSIDE).double()(INSIDE)
    assert torch.equal(z[:, [2, 4]], INSIDE[:, [2, 4]])
    expected = [3.25 * (0.25 - 0.5), math.log(0.5 / 3), -math.log(0.6 / 3.7)]
    torch.testing.assert_close(z[0, [0, 1, 3]].tolist(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_never_leave_the_bounds(dtype):
    layer = fit(b.BoundColumns, BOUNDED, INSIDE).to(dtype)
    z = torch.linspace(-300, 300, 999, dtype=dtype)[:, None].expand(-1, 5)
    x, log_det = layer.inverse(z)
    x = x.double()  # as a file holds them
    assert x.isfinite().all() and log_det.isfinite().all()
    assert x[:, 0].min() >= 0 and x[:, 0].max() <= 1 and x[:, 1].min() >= 2 and x[:, 3].max() <= 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_on_a_bound_stays_finite_and_one_beyond_it_does_not(dtype):
    layer = fit(b.BoundColumns, BOUNDED, INSIDE).to(dtype)
    on = torch.tensor([[0, 2, 1, 0.7, 0], [1, 3, 1, 0.1, 0]]).to(dtype)
    z, log_det = layer(on)
    assert z.isfinite().all() and log_det.isfinite().all() and z.abs().max() < 40
    torch.testing.assert_close(layer.inverse(z)[0], on, rtol=0, atol=1e-6)
    flow = Flow((5,), lambda **_: layer)
    for column, value in ((0, -0.001), (0, 1.001), (1, 1.9), (3, 0.8)):
        beyond = INSIDE.clone().to(dtype)
        beyond[1, column] = value
        with pytest.raises(ValueError, match="row 1 of x, .* has no log-likelihood that is finite"):
            flow.log_prob(beyond)


def test_a_column_with_values_beyond_its_bounds_is_refused():
    with pytest.raises(ValueError, match="BoundColumns: column 'price' has values from 1.5 to 9, beyond its bounds"):
        fit(b.BoundColumns, BOUNDED, torch.tensor([[0.5, 1.5, 9, 0, 3], [0.5, 9, -9, 0, 3]]))


def test_the_density_between_bounds_integrates_to_one():
    rows = torch.rand(500, 1).square()
    links = parts.standardize((1,), BOUNDED[:1])
    flow = Flow((1,), lambda **_: fit(links, BOUNDED[:1], rows)).double()
    x = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    assert flow.log_prob(x).exp().mean().item() == pytest.approx(1, abs=1e-3)
    z = flow.bijection(rows.double())[0]
    assert abs(z.mean()) < 1e-5 and z.std().item() == pytest.approx(1, abs=2e-3)


# ---- missing values


GAPS = (
    Column("real", "real", mean=2.0, std=0.5, missing=True),
    Column("count", "integer", mean=3.5, std=2.0, missing=True),
    Column("text", "categorical", ("a", "b", "c"), mean=1.4, std=0.9, missing=True),
    Column("whole", "real", mean=0.0, std=1.0),
    Column("share", "real", mean=0.3, std=0.1, low=0.0, high=1.0, missing=True),
    Column("price", "real", mean=5.0, std=2.0, low=2.0, missing=True),
    Column("debt", "real", mean=-3.0, std=2.0, high=0.7, missing=True),
    Column("phi", "angle", low=-180.0, high=180.0, missing=True),
)
NAN = math.nan
ROWS = torch.tensor(
    [
        [2.5, 7, 2, 0.1, 0.5, 3, 0.1, 90, 0, 0, 0, 0, 0, 0, 0],
        [NAN, NAN, NAN, 0.1, NAN, NAN, NAN, NAN, 1, 1, 1, 1, 1, 1, 1],
        [NAN, 0, 1, -0.1, NAN, 2.2, NAN, -179, 1, 0, 0, 1, 0, 1, 0],
    ]
)


def test_links_take_missing_values_and_give_them_back():
    links = fit(parts.standardize((15,), GAPS), GAPS, ROWS.repeat(50, 1))
    assert [type(layer) for layer in links] == [b.DequantizeColumns, b.FillMissing, b.BoundColumns, b.Standardize]
    flow = Flow((15,), lambda **_: links)
    assert flow.log_prob(ROWS).isfinite().all()
    assert torch.equal(flow.encode(ROWS), flow.encode(ROWS))
    torch.testing.assert_close(flow.decode(flow.encode(ROWS)), ROWS, equal_nan=True, rtol=1e-5, atol=1e-5)
    samples = flow.sample(500)
    for column, indicator in zip((0, 1, 2, 4, 5, 6, 7), range(8, 15)):
        gaps = samples[:, indicator] == 1
        assert torch.equal(samples[:, column].isnan(), gaps) and 0 < gaps.sum() < 500
    assert samples[:, 8:].unique().tolist() == [0, 1] and not samples[:, 3].isnan().any()


def test_a_number_that_is_not_finite_is_refused_beside_missing_ones():
    flow = Flow((15,), lambda **_: fit(parts.standardize((15,), GAPS), GAPS, ROWS.repeat(50, 1)))
    for column, value in ((3, NAN), (0, math.inf), (4, -math.inf), (9, NAN)):
        rows = ROWS.clone()
        rows[1, column] = value
        with pytest.raises(ValueError, match="row 1 of x holds a number that is not finite"):
            flow.log_prob(rows)
    denied, invented = ROWS.clone(), ROWS.clone()
    denied[1, 8], invented[1, 0] = 0, 2.5
    with pytest.raises(ValueError, match="row 1 of x holds a number that is not finite"):
        flow.log_prob(denied)
    with pytest.raises(ValueError, match="row 1 of x, .* has no log-likelihood"):
        flow.log_prob(invented)
    plain = Flow((2,), partial(b.Chain, layers={"standardize": b.Standardize}))
    with pytest.raises(ValueError, match="row 0 of x holds a number that is not finite"):
        plain.log_prob(torch.tensor([[1.0, NAN]]))


def test_what_fills_a_gap_has_the_density_that_is_subtracted():
    """E[1/q] over the noise is the length of an interval that holds it: by histogram for each kind of noise."""
    layer = fit(b.FillMissing, GAPS).double()
    columns = {
        0: stats.norm(2, 0.5),
        1: stats.norm(3.5, 2),
        2: stats.uniform(0, 3),
        4: stats.uniform(0, 1),
        5: stats.expon(2, 3),
        7: stats.uniform(-180, 360),
    }
    for column, expected in columns.items():
        rows = ROWS[:1].double().repeat(4000, 1)
        rows[:, column], rows[:, 8 + (0, 1, 2, 4, 5, 6, 7).index(column)] = NAN, 1
        y, log_det = layer(rows)
        np.testing.assert_allclose(-log_det.numpy(), expected.logpdf(y[:, column].numpy()), rtol=1e-6, atol=1e-6)
        assert stats.kstest(y[:, column].numpy(), expected.cdf).pvalue > 1e-3
        back, back_log_det = layer.inverse(y)
        assert torch.equal(back.isnan(), rows.isnan())
        torch.testing.assert_close(back_log_det, -log_det)


def test_fill_noise_is_the_same_for_any_number_of_processes():
    layer = fit(b.FillMissing, GAPS)
    rows = ROWS[[1, 2, 1, 2]]
    torch.manual_seed(3)
    whole = layer(rows)[0]
    parts_of_it = []
    for first in (0, 2):
        torch.manual_seed(3)
        with global_batch.rows(first, 4):
            parts_of_it.append(layer(rows[first : first + 2])[0])
    assert torch.equal(torch.cat(parts_of_it), whole)


def test_the_bound_with_missing_values_is_at_most_one_and_tight_after_training(monkeypatch):
    """exp(bound), summed over indicators and integrated over what is observed, on a table of two columns."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(20_000, 1, generator=generator)
    x = 0.7 * y + 0.5 * torch.randn(len(y), 1, generator=generator)
    gap = (torch.rand(len(y), 1, generator=generator) < 0.15 + 0.3 * (y > 0)).float()
    rows = torch.cat([torch.where(gap > 0, NAN, x), y, gap], 1)
    columns = Columns(
        (
            Column("x", "real", mean=x[gap == 0].mean().item(), std=x[gap == 0].std().item(), missing=True),
            Column("y", "real", mean=y.mean().item(), std=y.std().item()),
        )
    )
    preprocess = partial(parts.standardize, columns=columns.encoded)
    flow = flows.nsf_autoregressive((3,), steps=2, hidden=24, preprocess=preprocess)
    fit_to_columns(flow.bijection, columns, rows)
    flow.initialize(rows[:1000])
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        batch = rows[torch.randint(len(rows), (256,), generator=generator)]
        optimizer.zero_grad()
        (-flow(batch).mean()).backward()
        optimizer.step()
        schedule.step()
    mass = total_bound(flow.double(), monkeypatch)
    assert 0.98 <= mass <= 1 + 1e-3  # of the quadrature and of a network's kinks


@torch.no_grad()
def total_bound(flow, monkeypatch) -> float:
    """Σ over the indicator of ∫ exp(bound) over what is observed, for rows (x, y, indicator of x).

    The bound is averaged over the noise that fills x. The dequantization of the indicator is integrated.
    """
    side = torch.linspace(-4.5, 4.5, 61, dtype=torch.float64)
    step = (side[1] - side[0]).item()
    (level, share), (fill, weight) = gauss_legendre(24), gauss_legendre(24)

    def log_prob(rows, fill):
        """log ∫ p du, u the dequantization of the indicator, for rows and the noise that fills x in each."""
        fill = fill.repeat_interleave(len(level))
        noise = torch.stack([fill, fill, level.repeat(len(rows))], 1)
        monkeypatch.setattr(global_batch, "uniform", lambda shape, **_: noise)
        return (flow(rows.repeat_interleave(len(level), 0)).view(-1, len(level)) + share.log()).logsumexp(1)

    points = torch.cartesian_prod(side, side, torch.zeros(1).double())
    observed = log_prob(points, torch.full((len(points),), 0.5).double()).exp().sum() * step**2
    points = torch.stack([NAN * side, side, torch.ones_like(side)], 1).repeat_interleave(len(fill), 0)
    bound = log_prob(points, fill.repeat(len(side))).view(len(side), len(fill)) @ weight
    return (observed + bound.exp().sum() * step).item()


def gauss_legendre(count: int):
    """Places and weights to integrate over [0, 1]."""
    at, weight = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(count))
    return (at + 1) / 2, weight / 2


# ---- quantiles


def draws(name: str) -> torch.Tensor:
    """4,000 numbers (N, 1) of a distribution that is hard to standardize."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 1, generator=generator)
    return {
        "cauchy": normal / torch.randn(4000, 1, generator=generator),
        "lognormal": (3 * normal).exp(),
        "an atom": normal.clamp(min=0) * 100,
        "two values": (normal > 1).float(),
        "large": 1e7 + normal.round(),
        "constant": torch.full_like(normal, 7.0),
        "few rows": normal[:3],
        "one row": normal[:1],
    }[name]


@pytest.mark.parametrize(
    "name", ["cauchy", "lognormal", "an atom", "two values", "large", "constant", "few rows", "one row"]
)
def test_quantiles_are_exact_and_monotone_whatever_the_distribution(name):
    rows = draws(name)
    layer = fit(b.QuantileColumns, [Column("x", "real")], rows).double()
    spread = rows.double().std(correction=0) + 1
    x = torch.cat([rows[:200].double(), rows.double().mean() + spread * torch.linspace(-5, 5, 101)[:, None].double()])
    z, log_det = layer(x)
    assert z.isfinite().all() and log_det.isfinite().all()
    order = x[:, 0].argsort()
    assert (z[order, 0].diff() >= 0).all()
    assert_exact(layer, x[::20], tolerance=1e-6 * spread.item())


@pytest.mark.parametrize("name", ["cauchy", "lognormal"])
def test_quantiles_make_a_column_normal(name):
    z, _ = fit(b.QuantileColumns, [Column("x", "real")], draws(name))(draws(name))
    assert stats.kstest(z[:, 0].numpy(), stats.norm.cdf).statistic < 0.02
    assert z.abs().max() < 20 or name == "cauchy"


def test_quantiles_come_after_all_other_links_and_leave_angles_alone():
    links = fit(parts.quantile((15,), GAPS), GAPS, ROWS.repeat(50, 1))
    assert [type(layer) for layer in links][-1] is b.QuantileColumns
    flow = Flow((15,), lambda **_: links)
    torch.testing.assert_close(flow.decode(flow.encode(ROWS)), ROWS, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert torch.equal(links.quantile(ROWS.nan_to_num())[0][:, 7], ROWS.nan_to_num()[:, 7])


@pytest.mark.parametrize("name", ["an atom", "lognormal"])
def test_the_density_with_quantiles_integrates_to_one(name):
    layer = fit(b.QuantileColumns, [Column("x", "real")], draws(name)).double()
    flow = Flow((1,), lambda **_: layer).double()
    far = torch.tensor([[-9.0], [9.0]], dtype=torch.float64)
    knots = torch.cat([layer.x[0], layer.inverse(far)[0][:, 0]]).sort().values
    share = torch.linspace(0, 1, 33, dtype=torch.float64)[:-1]
    x = torch.cat([(knots[:-1, None] + knots.diff()[:, None] * share).flatten(), knots[-1:]])
    assert torch.trapezoid(flow.log_prob(x[:, None]).exp(), x).item() == pytest.approx(1, abs=1e-3)


# ---- angles


RING = (Column("phi", "angle", low=0.0, high=360.0), Column("r", "real"), Column("psi", "angle", low=-1.0, high=1.0))
MODELS = sorted({*options("model")} - {*ONLY_IMAGES})


def flow_with_angles(columns, model="maf", context=None, preprocess="standardize", *overrides):
    """A flow of ``model`` for a table of ``columns``, fitted, with weights that are not those of its start."""
    columns = Columns(tuple(columns))
    shape = (len(columns.encoded),)
    spec = DataSpec("table", shape, context=context and ColumnContext(("c",), (context,)), columns=columns.encoded)
    flow = flow_of(f"model={model}", "dataset=table", f"preprocess={preprocess}", "smoke=true", *overrides, spec=spec)
    rows = 0.6 * torch.rand(50, *shape)
    for i, column in enumerate(columns.modelled):
        rows[:, i] += 0 if column.high is not None else column.low or 0
        if column.missing:
            indicator = columns.encoded.index(Column(column.name, "indicator"))
            rows[:, indicator] = (rows[:, indicator] > 0.3).float()
            rows[rows[:, indicator] == 1, i] = NAN
    fit_to_columns(flow.bijection, columns, rows)
    return randomize(flow)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_angles(model):
    flow = flow_with_angles(RING, model, context=2).float()
    context = torch.randn(40, 2)
    x = flow.sample(1, context=context)[0]
    assert x[:, 0].min() >= 0 and x[:, 0].max() <= 360 and x[:, 2].min() >= -1 and x[:, 2].max() <= 1
    ends = x.clone(), x.clone()
    for end, value in zip(ends, (0.0, 360.0)):
        end[:, 0] = value
    with exact_trace():
        torch.testing.assert_close(*(flow.log_prob(end, context) for end in ends), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.decode(flow.encode(x, context), context), x, rtol=1e-3, atol=1e-3)


def test_angles_are_exact():
    flow = flow_with_angles(RING)
    x = torch.tensor([[10.0, 0.5, -0.9], [359.0, -2.0, 0.3], [170.0, 0.1, 0.1]], dtype=torch.float64)
    assert_exact(flow.bijection, x)


def test_an_angle_is_a_circle():
    """The density, its slope and any number of turns: the seam is no place of its own."""
    flow = flow_with_angles(RING[:1])
    x = torch.tensor([[0.0], [360.0], [1e-7], [360 - 1e-7], [-720.0]], dtype=torch.float64)
    found = flow.log_prob(x)
    torch.testing.assert_close(found, found[:1].expand(5), rtol=0, atol=1e-6)
    assert flow.log_prob(torch.tensor([[90.0]], dtype=torch.float64)) != found[0]


@pytest.mark.parametrize("columns", [RING[:1], RING[:2], RING[::2]])
def test_a_density_with_angles_integrates_to_one(columns):
    flow = flow_with_angles(columns)
    ends = {"phi": (0, 360), "r": (-12, 12), "psi": (-1, 1)}
    axes, cell = [], 1.0
    for column in columns:
        low, high = ends[column.name]
        axes.append(low + (high - low) * (torch.arange(400, dtype=torch.float64) + 0.5) / 400)
        cell *= (high - low) / 400
    x = torch.cartesian_prod(*axes).view(-1, len(columns))
    assert flow.log_prob(x).exp().sum().item() * cell == pytest.approx(1, abs=2e-3)


def test_an_angle_may_be_missing_and_depends_on_what_comes_before():
    columns = (*GAPS[:2], replace(RING[0], missing=True), RING[2])
    flow = flow_with_angles(columns, "nsf_coupling", None, "quantile").float()
    x = flow.sample(300)
    gaps = x[:, 6] == 1
    assert torch.equal(x[:, 2].isnan(), gaps) and 0 < gaps.sum() < 300
    assert flow.log_prob(x).isfinite().all()
    back = flow.decode(flow.encode(x))
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3, equal_nan=True)
    moved = x.clone()
    moved[:, 3] = 0.123
    assert (flow.encode(moved)[:, -1] != flow.encode(x)[:, -1]).any()
    assert torch.equal(flow.encode(moved)[:, :-1], flow.encode(x)[:, :-1])


def test_circular_splines_learn_a_distribution_across_the_seam():
    """von Mises around the seam: the negative entropy to 0.02 nats."""
    generator = np.random.default_rng(0)
    x = torch.tensor(generator.vonmises(np.pi, 3.0, (4000, 1))).float()
    x = torch.where(x < 0, x + 2 * np.pi, x)
    columns = Columns((Column("phi", "angle", low=0.0, high=2 * math.pi),))
    flow = with_angles(flows.maf, (1,), columns=[0])
    fit_to_columns(flow.bijection, columns, x)
    optimizer = torch.optim.Adam(flow.parameters(), 3e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow(x).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(-stats.vonmises(3.0, np.pi).logpdf(x.numpy()).mean(), abs=0.02)


def test_the_splines_of_angles_have_keys():
    flow = flow_with_angles(RING, "maf", None, "standardize", "angles.bins=5", "angles.hidden=16")
    assert flow.bijection.factored.second.splines.univariate.bins == 5
    assert flow.bijection.factored.second.splines.net.linears[0].out_features == 16


def test_angles_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="both ends of the angle 'phi'"):
        fit(b.Turns, [Column("phi", "angle")])
    with pytest.raises(UsageError, match="preprocess=none: nothing fills missing values"):
        flow_with_angles(GAPS, "maf", None, "none")
    with pytest.raises(ValueError, match="must leave some of 2 columns"):
        b.Factored((2,), [0, 1], b.ActNorm, b.ActNorm)
    with pytest.raises(ValueError, match="do not make up a shape"):
        Joint((3,), [Logistic((1,))])


# ---- what else must know of them


def flow_of_gaps(model="nsf_autoregressive"):
    return flow_with_angles(GAPS, model).float()


def test_an_audit_passes_over_missing_values_and_bounds():
    flow = flow_of_gaps()
    rows = flow.sample(60)
    assert rows.isnan().any()
    flow.initialize(rows)
    failed = [check for check in audit(flow, rows) if not check.passed]
    assert not failed


def test_an_audit_counts_a_missing_value_that_comes_back_as_a_number():
    flow = flow_of_gaps()
    rows = flow.sample(60)
    flow.bijection.preprocess.fill.inverse = lambda z, context=None: (z, z.new_zeros(len(z)))
    assert _count_changes(flow, rows, None) == rows.isnan().sum()


def test_a_divergence_is_not_blamed_on_missing_values():
    flow = flow_of_gaps().requires_grad_().train()
    rows = flow.sample(60)
    with torch.no_grad():
        next(flow.bijection.factored.first.parameters()).fill_(NAN)

    def step():
        loss = -flow(rows).mean()
        loss.backward()
        return loss

    assert examine(flow, step).layer.startswith("factored.first")
    rows[3, 0], rows[3, 8] = math.inf, 0
    assert examine(flow, step).layer == "data"


def test_fitting_before_training_is_a_function_of_the_seed():
    rows = flow_of_gaps().sample(300)
    made = []
    for seed in (1, 1, 2):
        flow = Flow((15,), partial(parts.quantile, columns=Columns(GAPS).encoded))
        fit_to_data(flow, ArraySplit(rows, columns=Columns(GAPS)), seed)
        made.append(flow.bijection.quantile.x)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


def test_fitting_names_the_layer_and_its_key():
    flow = Flow((3,), b.Standardize)
    with pytest.raises(UsageError, match="preprocess: Standardize: needs what is known of 3 columns, not 2"):
        fit_to_data(flow, ArraySplit(torch.zeros(4, 3), columns=Columns(GAPS[3:4] * 2)), 0)
