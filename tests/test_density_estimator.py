"""``flowtrain.DensityEstimator`` is an estimator as scikit-learn wants one."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from flowtrain import DensityEstimator

X = np.random.default_rng(0).normal(size=(120, 3)) * [1.0, 5.0, 0.2]
SHORT = {"max_steps": 6, "model.hidden": 8}


def estimator(**keys):
    return DensityEstimator(**{"options": SHORT, "minutes": 1.0} | keys)


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X)


@pytest.mark.slow
def test_scikit_learns_own_checks_pass():
    options = {"max_steps": 2, "model.pairs": 1, "model.hidden": 4}
    results = check_estimator(estimator(options=options), on_skip=None, on_fail=None)
    assert len(results) > 35
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert not failed


def test_it_scores_rows_in_float64_and_samples(fitted):
    nats = fitted.score_samples(X)
    assert nats.shape == (120,) and nats.dtype == np.float64
    assert fitted.score(X) == pytest.approx(nats.mean())
    assert np.allclose(fitted.score_samples(X[::-1]), nats[::-1], rtol=1e-12)
    drawn = fitted.sample(7, random_state=3)
    assert drawn.shape == (7, 3) and drawn.dtype == np.float64
    assert np.array_equal(drawn, fitted.sample(7, random_state=3))
    assert not np.array_equal(drawn, fitted.sample(7, random_state=4))


def test_its_parameters_are_those_of_the_constructor():
    one = estimator(model="maf", random_state=3)
    assert one.get_params()["model"] == "maf"
    other = clone(one.set_params(minutes=0.5))
    assert other.get_params() == one.get_params() and not hasattr(other, "flow_")
    assert repr(other).startswith("DensityEstimator(minutes=0.5, model='maf'")


def test_a_seed_gives_the_same_estimate():
    once, again, other = (estimator(random_state=seed).fit(X).score(X) for seed in (5, 5, 6))
    assert once == again != other


def test_it_can_be_pickled_and_copied(fitted):
    for other in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert np.array_equal(other.score_samples(X), fitted.score_samples(X))


def test_it_works_in_a_pipeline():
    pipeline = make_pipeline(StandardScaler(), estimator()).fit(X)
    assert np.isfinite(pipeline.score_samples(X)).all() and pipeline.score(X) < 0


def test_it_works_in_a_grid_search():
    grid = {"options": [SHORT | {"model.pairs": pairs} for pairs in (1, 2)]}
    search = GridSearchCV(estimator(), grid, cv=2).fit(X)
    assert search.best_params_["options"] in grid["options"] and search.best_score_ == pytest.approx(
        max(search.cv_results_["mean_test_score"])
    )


@pytest.mark.slow
def test_a_grid_search_may_use_processes():
    search = GridSearchCV(estimator(), {"model": ["maf", "nsf_coupling"]}, cv=2, n_jobs=2).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_names_of_features_are_checked():
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    fitted = estimator().fit(frame)
    assert list(fitted.feature_names_in_) == ["a", "b", "c"] and fitted.n_features_in_ == 3
    with pytest.raises(ValueError, match="feature names"):
        fitted.score_samples(frame[["b", "a", "c"]])
    with pytest.raises(ValueError, match="2 features, but DensityEstimator is expecting 3"):
        fitted.score_samples(X[:, :2])


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="minimum of 10 is required"):
        estimator().fit(X[:9])
