"""``model="auto"``: validation chooses among mixtures and flows, within the minutes, and says why."""

import pickle

import numpy as np
import pytest
import torch

import flowtrain
from flowtrain.inference.given import given
from flowtrain.inference.mixtures import gaussian_mixture, kernel_density, standardized

RANDOM = np.random.default_rng(0)
BLOBS = RANDOM.normal(size=(300, 2)) * 0.1 + RANDOM.choice([-3.0, 0.0, 3.0], size=(300, 1))
TINY = {"trainer.val_every": 5}


@pytest.fixture(scope="module")
def chosen():
    flowtrain.fit(BLOBS, model="auto", minutes=0.01, progress=False)  # so that what is imported once has been
    flow = flowtrain.fit(BLOBS, model="auto", minutes=0.1, progress=False)
    return flow


def test_blobs_are_a_gaussian_mixture(chosen):
    flow = chosen
    assert flow.fitted.model.startswith("gaussian_mixture(components=")
    assert "gaussian_mixture" in flow.fitted.why and "±" in flow.fitted.why
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.1**2) * 2 + np.log(3)
    fresh = RANDOM.normal(size=(2000, 2)) * 0.1 + RANDOM.choice([-3.0, 0.0, 3.0], size=(2000, 1))
    assert flow.log_prob(torch.from_numpy(fresh)).mean().item() == pytest.approx(-entropy, abs=0.1)


def test_every_candidate_has_its_figure_the_best_first(chosen):
    candidates = chosen.fitted.candidates
    assert {one.name.partition("(")[0] for one in candidates} >= {"gaussian_mixture", "kernel_density"}
    assert any(one.name.startswith(("maf", "nsf")) for one in candidates)
    figures = [one.log_likelihood for one in candidates]
    assert figures == sorted(figures, reverse=True) and all(one.log_likelihood_stderr > 0 for one in candidates)


def test_it_keeps_to_the_minutes_with_all_candidates(chosen):
    assert chosen.fitted.seconds < 6.0 * 1.5  # of a machine that does other things too


def test_what_is_chosen_is_a_flow_like_any_other(chosen):
    flow, x = chosen, torch.from_numpy(BLOBS)
    assert torch.equal(pickle.loads(pickle.dumps(flow)).log_prob(x), flow.log_prob(x))
    assert torch.allclose(flow.decode(flow.encode(x)).double(), x, atol=1e-5)
    assert abs(flow.sample(3000).mean(0)).max() < 0.5


def test_a_context_leaves_flows_alone_to_choose_from():
    context = RANDOM.normal(size=(300, 1))
    flow = flowtrain.fit(BLOBS + context, context, "auto", minutes=0.05, options=TINY, progress=False)
    assert flow.fitted.model.startswith(("maf", "nsf")) and flow.fitted.steps > 0


def test_lines_say_what_was_tried(capsys):
    flowtrain.fit(BLOBS[:50], model="auto", minutes=0.05, options={"max_steps": 3}, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("model=auto: ")]) >= 4 and "validation" in lines[-1]


def test_a_kernel_density_has_the_bandwidth_that_validation_prefers():
    from sklearn.neighbors import KernelDensity

    x = RANDOM.uniform(-1, 1, size=(400, 2)) ** 3
    _, train, val = standardized(given(x), 0)
    found = kernel_density(train, val)
    assert "round" in found.name or "correlated" in found.name
    figure = found.base.log_prob(val).mean().item()
    widths = np.geomspace(0.02, 2, 30)
    best = max(KernelDensity(bandwidth=width).fit(train).score(val) / len(val) for width in widths)
    assert figure >= best - 0.02
    more = found.refit(torch.cat([train, val]))
    assert more.mean.shape == (400, 2)


def test_a_mixture_is_that_of_scikit_learn_at_its_best():
    from sklearn.mixture import GaussianMixture

    _, train, val = standardized(given(BLOBS), 0)
    found = gaussian_mixture(train, val, 0, seconds=60)
    figure = found.base.log_prob(val).mean().item()
    theirs = max(
        GaussianMixture(k, covariance_type=kind, random_state=0).fit(train.double().numpy()).score(val.double().numpy())
        for k in (1, 2, 3, 4)
        for kind in ("full", "tied", "diag")
    )
    assert figure >= theirs - 1e-3
    assert found.refit(torch.cat([train, val])).mean.shape == found.base.mean.shape
