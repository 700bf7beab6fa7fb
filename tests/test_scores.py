"""Scores with a meaning: p-values are valid, typicality is two-sided, and log p splits over columns."""

import re
from functools import partial

import numpy as np
import pytest
import torch

from flowtrain import bijections as b
from flowtrain import distributions, flows, nets
from flowtrain.flows.angles import with_angles
from flowtrain.scores.chain_rule import ChainRule
from flowtrain.scores.conformal import Conformal
from flowtrain.scores.typicality import entropy, typicality

SMALL = {"hidden": 16}
SPLIT = {
    "made": partial(flows.made, **SMALL, order="reversed"),
    "random order": partial(flows.made, **SMALL, order="random"),
    "made_mog": partial(flows.made, **SMALL, univariate=b.MixtureNormal, base=distributions.Logistic),
    "maf": partial(flows.maf, **SMALL, mixing=None),
    "maf, one layer": partial(flows.maf, **SMALL, steps=1),
    "maf_mog": partial(flows.maf_mog, **SMALL, mixing=None),
    "iaf": partial(flows.iaf, **SMALL, mixing=None),
    "nsf": partial(flows.nsf_autoregressive, **SMALL, mixing=None),
    "shuffled": partial(flows.nsf_autoregressive, **SMALL, steps=1, mixing=b.Shuffle),
    "angles": partial(with_angles, partial(flows.maf, **SMALL, mixing=None), columns=[2, 0]),
    "bounded": partial(flows.made, **SMALL, preprocess=partial(b.Box, low=-9, high=[9, None, 9, 9])),
    "embedded": partial(flows.made, **SMALL, context_shape=(2,), embedding=nets.MLPEmbedding),
    "context": partial(flows.made, **SMALL, base=distributions.ConditionalNormal, context_shape=(2,)),
}
MIXED = {
    "maf": (flows.maf, "layers 'steps.0.autoregressive' and 'steps.1.autoregressive' take the columns in different"),
    "nsf": (flows.nsf_autoregressive, r"layer 'steps.0.mixing.lu' \(LULinear\) mixes columns"),
    "coupling": (flows.realnvp_vector, r"\(Coupling\) mixes columns"),
    "ffjord": (flows.ffjord, "mixes columns"),
    "residual": (flows.residual, "mixes columns"),
    "base": (partial(flows.made, base=distributions.Mixture), "Mixture, are not independent"),
}


def random_flow(make, shape):
    """A flow away from the identity, in evaluation mode."""
    torch.manual_seed(0)
    flow = make(shape).eval()
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return flow.double()


@pytest.mark.parametrize("name", SPLIT)
def test_the_columns_sum_to_log_p_and_follow_the_order(name):
    flow = random_flow(SPLIT[name], (4,))
    rule, x = ChainRule(flow), torch.randn(5, 4, dtype=torch.float64)
    context = torch.randn(5, 2, dtype=torch.float64) if flow.context_shape else None
    terms = rule.terms(x, context)
    torch.testing.assert_close(terms.sum(1), flow.log_prob(x, context), rtol=1e-9, atol=1e-9)
    assert sorted(rule.order) == [0, 1, 2, 3]
    for place, column in enumerate(rule.order):  # a term depends on no later column
        moved = x.clone()
        moved[:, column] += 0.3
        changed = ((rule.terms(moved, context) - terms).abs() > 1e-12).any(0)
        assert changed[column] and not changed[rule.order[:place]].any()


@pytest.mark.parametrize("name", MIXED)
def test_other_flows_do_not_split(name):
    make, says = MIXED[name]
    with pytest.raises(ValueError, match=says):
        ChainRule(make((4,)))
    if name in ("maf", "nsf"):  # one column has one order
        assert ChainRule(make((1,))).order == [0]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_each_term_is_a_density(order):
    """Its exponential integrates to one over its column, whatever the columns before it are."""
    flow = random_flow(partial(flows.made, hidden=16, order="sequential" if order == [0, 1] else "reversed"), (2,))
    rule, grid = ChainRule(flow), torch.linspace(-40, 40, 8001, dtype=torch.float64)
    assert rule.order == order
    for column in order:
        x = torch.full((len(grid), 2), 0.7, dtype=torch.float64)
        x[:, column] = grid
        assert torch.trapezoid(rule.terms(x)[:, column].exp(), grid).item() == pytest.approx(1, abs=1e-4)


def test_false_alarms_of_20_000_calibration_rows():
    random = torch.Generator().manual_seed(0)

    def log_prob(n: int) -> torch.Tensor:
        """Of rows of N(0, I) in four dimensions, by a density that is not theirs."""
        x = torch.randn(n, 4, generator=random)
        return -(x - 0.3).abs().sum(1)

    usual, fresh = Conformal(log_prob(20_000)), log_prob(100_000)
    for level in (0.01, 0.05, 0.2):
        low, high = usual.alarm_rates(level, 0.99)
        for p in (usual.p_values(fresh), usual.two_sided(fresh)):
            assert low < (p <= level).double().mean() < high
    assert 0.008 < (usual.p_values(fresh) <= 0.01).double().mean() < 0.012
    low, high = usual.alarm_rates(0.01, 0.99)
    assert 0.008 < low < high < 0.012


def test_p_values_are_valid_on_average_and_within_the_range():
    """Over many small calibration samples, ties included."""
    random = np.random.default_rng(0)
    level, n, within, mean = 0.1, 60, [], []
    for _ in range(400):
        for digits in (8, 0):  # without ties, and with many
            rows = torch.from_numpy(random.normal(size=n + 2000).round(digits))
            usual = Conformal(rows[:n])
            alarms = (usual.p_values(rows[n:]) <= level).double().mean().item()
            low, high = usual.alarm_rates(level, 0.9)
            if digits:
                within.append(low - 0.01 < alarms < high + 0.01)  # 2,000 rows measure a rate to 0.007
            mean.append((digits, alarms))
    assert 0.85 < np.mean(within) < 0.99
    untied, tied = (np.mean([alarms for digits, alarms in mean if digits == kind]) for kind in (8, 0))
    assert abs(untied - 6 / 61) < 0.006 and tied <= untied + 0.003


def test_few_rows_cannot_alarm():
    assert Conformal(torch.randn(98)).alarm_rates(0.01) == (0.0, 0.0)
    assert Conformal(torch.randn(99)).alarm_rates(0.01)[1] > 0.01
    assert (Conformal(torch.randn(98)).p_values(torch.tensor([-torch.inf])) > 0.01).all()
    for scores in (torch.empty(0), torch.tensor([1.0, torch.nan])):
        with pytest.raises(ValueError, match=re.escape(f"{len(scores)} calibration scores")):
            Conformal(scores)


def test_ties_count_as_at_least_as_unusual():
    usual = Conformal(torch.tensor([1.0, 2.0, 2.0, 3.0]))
    assert usual.p_values(torch.tensor([0.0, 2.0, 9.0])).tolist() == [0.2, 0.8, 1.0]
    assert usual.two_sided(torch.tensor([0.0, 2.0, 9.0])).tolist() == [0.4, 1.0, 0.4]
    assert usual.unusual(torch.tensor([0.0, 2.0, 9.0])).tolist() == [1.0, 0.5, 0.0]


def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    usual, odd = torch.randn(50).round(decimals=1), (torch.randn(70) - 1).round(decimals=1)
    expected = roc_auc_score([0] * 50 + [1] * 70, -torch.cat([usual, odd]))
    assert Conformal(usual).unusual(odd).mean().item() == pytest.approx(expected)


def test_typicality_sees_what_is_too_likely():
    """The mode of a Gaussian of many dimensions is not typical, though its density is the highest."""
    base = distributions.StandardNormal((100,))
    usual = base.log_prob(torch.randn(2000, 100))
    mode = base.log_prob(torch.zeros(1, 100))
    expected = 50 * (1 + np.log(2 * np.pi))
    assert entropy(usual) == pytest.approx(expected, abs=1)
    assert typicality(mode, expected).item() == pytest.approx(50, abs=0.01)
    assert Conformal(usual).p_values(mode) == 1 and Conformal(usual).two_sided(mode) < 0.002
