"""``flowtrain.fit``: the command's trainer on rows in memory, in the program of its user."""

import copy
import logging
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

import flowtrain
from flowtrain import train as command
from flowtrain.config.compose import conf_dir, train_config
from flowtrain.inference.given import given

SHORT = {"max_steps": 8, "model.hidden": 8}
X = np.random.default_rng(0).normal(size=(200, 3)) @ np.diag([1.0, 20.0, 0.1]) + [5.0, 300.0, -1.0]
C = np.random.default_rng(1).normal(100.0, 10.0, size=(200, 2))


def fit(x=X, context=None, model="nsf_coupling", options=SHORT, **keys):
    return flowtrain.fit(x, context, model, options=options, **{"minutes": 1.0, "progress": False} | keys)


@pytest.fixture(scope="module")
def flow():
    return fit()


def test_the_density_is_that_of_the_rows_in_their_units(flow):
    rows = flow.sample(2000, generator=torch.Generator().manual_seed(0)).double().numpy()
    assert abs(rows.mean(0) - X.mean(0)) == pytest.approx(0, abs=8) and rows.std(0) == pytest.approx(X.std(0), rel=0.5)
    nats = flow.log_prob(torch.from_numpy(X))
    normal = torch.distributions.Normal(torch.tensor(X.mean(0)), torch.tensor(X.std(0)))
    assert nats.mean().item() == pytest.approx(normal.log_prob(torch.tensor(X)).sum(1).mean().item(), abs=0.5)
    assert not flow.training and flow.fitted.validation_rows == 50 and flow.fitted.training_rows == 150
    assert flow.fitted.history and flow.fitted.steps == 8


def test_its_figure_is_the_mean_of_the_rows_set_apart():
    data = given(X, seed=3)
    flow = fit(seed=3)
    nats = flow.log_prob(data.val.data)
    assert flow.fitted.log_likelihood == pytest.approx(nats.mean().item(), abs=1e-5)
    assert flow.fitted.log_likelihood_stderr == pytest.approx(nats.std().item() / len(nats) ** 0.5, rel=1e-4)


def test_arrays_tensors_and_lists_of_both_precisions_give_the_same_flow(flow):
    for x in (torch.from_numpy(X).requires_grad_(), X.tolist(), X.astype(np.float32)):
        assert fit(x).fitted.log_likelihood == pytest.approx(flow.fitted.log_likelihood, rel=1e-5)


def test_it_trains_as_the_command_does(tmp_path, monkeypatch):
    """Same rows, start, batches, validation and steps: the same figure."""
    monkeypatch.chdir(tmp_path)
    data = given(X, seed=1)
    words = (
        "model=nsf_coupling",
        "model.hidden=8",
        "max_steps=8",
        "trainer.val_every=50",
        "compile=false",
        "logger=none",
    )
    config = train_config(*words, "dataset=table", "dataset.path=x.npy", "dataset.val_size=50", "dataset.test_size=1")
    monkeypatch.setattr("flowtrain.training.setup.build_dataset", lambda config: _DataSet(data))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    summary = command.main(config, str(tmp_path / "run"))
    assert fit().fitted.log_likelihood == pytest.approx(summary["log_likelihood"], abs=1e-6)


class _DataSet:
    def __init__(self, data):
        self.spec, self.augment, self.path = data.spec, None, None
        self.split = {"train": data.train, "val": data.val}.get
        self.find, self.root = lambda: None, "."


def test_contexts_are_standardized_inside():
    flow = fit(X + C[:, :1], C, options={"max_steps": 60, "model.hidden": 16})
    x, c = torch.from_numpy(X + C[:, :1]), torch.from_numpy(C)
    assert flow.log_prob(x, c).mean() > flow.log_prob(x, c.flip(0)).mean() + 0.1
    assert flow.sample(4, context=c[:3]).shape == (4, 3, 3)
    assert (copy.deepcopy(flow).double().log_prob(x, c) - flow.log_prob(x, c)).abs().max() < 1e-3


def test_a_base_that_depends_on_the_context_gets_it_standardized():
    flow = fit(X, C, "maf", SHORT | {"base": "class_normal", "optimizer.lr": 0.1})
    data = given(X, C, seed=1)
    nats = flow.log_prob(data.val.data, data.val.context * data.moments[1] + data.moments[0])
    assert nats.mean().item() == pytest.approx(flow.fitted.log_likelihood, abs=1e-4)
    assert flow.base.affine.weight.abs().max() > 0


FRAME = pd.DataFrame(
    {
        "length": X[:, 0],
        "kind": np.where(X[:, 1] > 300, "tall", "short"),
        "count": np.arange(200) % 7,
        "when": pd.date_range("2024-01-01", periods=200, freq="h"),
    }
)


def test_a_frame_has_the_column_types_of_the_command():
    flow = fit(FRAME)
    columns = flow.fitted.columns
    assert [column.kind for column in columns.modelled] == ["real", "categorical", "integer", "time"]
    x, context = columns.encode(FRAME)
    assert context is None and flow.log_prob(x).isfinite().all()
    drawn = pd.DataFrame(columns.decode(flow.sample(20)))
    assert list(drawn) == list(FRAME) and {*drawn["kind"]} <= {"tall", "short"}


def test_a_frame_may_have_contexts_types_and_gaps():
    gaps = FRAME.assign(length=FRAME["length"].where(FRAME["count"] != 3))
    with pytest.raises(ValueError, match=r"missing in 'length' 29 \(first in row 4\); missing=drop leaves"):
        fit(gaps)
    flow = fit(gaps, ["kind"], missing="model", types={"count": "category"}, columns=["length", "count"])
    x, context = flow.fitted.columns.encode(gaps)
    assert x.shape == (200, 3) and context.shape == (200, 2) and flow.log_prob(x, context).isfinite().all()
    assert fit(gaps, missing="drop").fitted.training_rows == 129


def test_rows_with_missing_values_of_an_array_can_be_left_out():
    x, c = X.copy(), C.copy()
    x[3, 1], c[4, 0] = np.nan, np.nan
    flow = fit(x, c, missing="drop")
    assert flow.fitted.training_rows + flow.fitted.validation_rows == 198


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "nsf_couplng"}, "no such model; there are nsf_coupling"),
        ({"model": "glow"}, "takes images"),
        ({"x": X[:3]}, "x has 3 rows; a density needs at least 10"),
        ({"x": X[:0]}, "x is empty"),
        ({"x": X[:, 0]}, r"x\[:, None\] is a column"),
        ({"x": np.where(X == X[4, 1], np.nan, X)}, r"row 4, column 1 is missing \(NaN\); missing='drop'"),
        ({"x": np.where(X == X[4, 1], np.inf, X)}, "row 4, column 1 inf is not a finite number"),
        ({"x": X.astype(str)}, "must be numbers"),
        ({"x": X + [0, 1e10, 0]}, "float32 does not resolve column 1"),
        ({"x": X * [1, 1, 0]}, "column 2 is .* in all 150 rows"),
        ({"context": C[:5]}, "x has 200 rows, context 5"),
        ({"x": FRAME, "context": C}, "the names of its columns"),
        ({"types": {"a": "real"}}, "only the columns of a DataFrame"),
        ({"missing": "model"}, "a DataFrame may also have model"),
        ({"options": {"model.hiden": 3}}, "no key 'model.hiden'; there are model.hidden"),
        ({"options": {"dataset.path": "x"}}, "dataset.path cannot be set here"),
        ({"options": {"base": "mxture"}}, "no such base; there are mixture"),
        ({"options": {"batch_size": 500}}, r"batch_size=500 is larger than the train split \(150\)"),
        ({"options": {}, "minutes": None}, "max_steps or trainer.max_epochs"),
        ({"minutes": 0}, "minutes=0: must be a number above 0"),
        ({"val_size": 200}, "val_size=200"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "abacus"}, "device=abacus"),
        ({"model": "auto"}, r"leave out model\.…"),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit(**arguments)
    assert "\n" not in str(caught.value)


def test_a_training_that_fails_says_so():
    with pytest.raises(RuntimeError, match="steps in a row had a loss or gradient that is not finite"):
        fit(
            model="maf",
            options={"optimizer.lr": 1e7, "trainer.clip": None, "trainer.warmup_steps": 0, "max_steps": 200},
        )


def test_it_keeps_to_its_minutes(flow):
    """``flow``: so that what is imported once has been."""
    x = np.random.default_rng(0).normal(size=(100_000, 3))
    began = time.monotonic()
    fitted = fit(x, options={}, minutes=0.05).fitted
    assert time.monotonic() - began < 3.0 * 1.5  # of a machine that does other things too
    assert fitted.seconds > 3.0 * 0.7 and fitted.steps >= 1


def test_it_ends_when_validation_no_longer_improves():
    fitted = fit(
        options={"trainer.val_every": 2, "trainer.patience": 2, "model.hidden": 8, "optimizer.lr": 0.05}
    ).fitted
    assert fitted.seconds < 50 and fitted.log_likelihood == pytest.approx(
        max(entry["validation"] for entry in fitted.history if "validation" in entry), abs=1e-5
    )


def test_nothing_is_written_or_logged(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    fit(FRAME, options=SHORT | {"trainer.val_every": 2, "trainer.log_every": 1})
    assert not [*tmp_path.iterdir()] and not caplog.records and capfd.readouterr() == ("", "")
    fit(options=SHORT | {"trainer.log_every": 1}, progress=True)
    assert any("step 1" in record.message for record in caplog.records)  # not on a terminal: lines
    assert not [*tmp_path.iterdir()]


def test_the_state_of_torch_is_restored():
    torch.manual_seed(5)
    expected = torch.rand(3)
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.get_default_dtype()
    torch.manual_seed(5)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.no_grad():
            flow = fit(options=SHORT | {"deterministic": True})
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64 and next(flow.parameters()).dtype == torch.float32
    finally:
        torch.set_default_dtype(before[2])
    assert torch.equal(torch.rand(3), expected)
    assert before[:2] == (torch.get_num_threads(), torch.backends.cudnn.benchmark)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cuda.matmul.allow_tf32


def test_a_program_that_uses_hydra_keeps_its_own():
    base = VersionBase.instance().version_base
    with initialize_config_dir(str(conf_dir()), job_name="theirs", version_base="1.2"):
        theirs = GlobalHydra.instance().hydra
        fit()
        assert GlobalHydra.instance().hydra is theirs and str(VersionBase.instance().version_base) == "1.2"
        assert compose("train", overrides=["seed=7"]).seed == 7
    VersionBase.instance().version_base = base


def test_threads_that_fit_at_once_get_the_numbers_of_one_after_the_other():
    """With batch normalization, dropout and noise of whole numbers: steps, validations and starts that draw."""
    frame = pd.DataFrame({"a": np.arange(200) % 7, "b": X[:, 0]})
    options = {"max_steps": 30, "trainer.val_every": 5, "model.hidden": 8, "model.dropout": 0.1, "batch_size": 32}

    def work(seed):
        torch.set_num_threads(1)  # of this thread: another number may round otherwise
        return fit(frame, model="maf", options=options, seed=seed, minutes=None)

    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        together = [*threads.map(work, (1, 2, 1))]
    with ThreadPoolExecutor(1) as threads:
        alone = [*threads.map(work, (1, 2))]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(together, (*alone, alone[0])):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
        assert _figures(one) == _figures(other)


def _figures(flow):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in flow.fitted.history]


@pytest.fixture
def handler():
    """Python's own; a shell's background processes start with signals ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_a_keyboard_interrupt_and_leaves_the_session_as_it_was(flow, handler):
    """``flow``: so that nothing is being imported then."""
    rng = torch.get_rng_state()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fit(options={}, minutes=1.0)
    timer.join()
    assert signal.getsignal(signal.SIGINT) is handler and torch.equal(torch.get_rng_state(), rng)
    assert fit().fitted.steps == 8


@pytest.mark.parametrize("model", ["nsf_coupling", "maf"])
def test_a_fitted_flow_can_be_pickled_and_copied(model):
    flow = fit(X, C, model)
    x, c = torch.from_numpy(X), torch.from_numpy(C)
    for other in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        assert torch.equal(other.log_prob(x, c), flow.log_prob(x, c))
        assert other.fitted.log_likelihood == flow.fitted.log_likelihood


def test_flows_of_angles_can_be_pickled():
    frame = FRAME[["length", "count"]].assign(phi=np.linspace(0, 6, 200))
    flow = fit(frame, types={"phi": "angle"})
    x, _ = flow.fitted.columns.encode(frame)
    torch.manual_seed(0)
    nats = flow.log_prob(x)
    torch.manual_seed(0)
    assert torch.equal(pickle.loads(pickle.dumps(flow)).log_prob(x), nats)


def test_it_computes_in_float64_after_double(flow):
    x = torch.from_numpy(X)
    exact = copy.deepcopy(flow).double().log_prob(x)
    assert exact.dtype == torch.float64 and (exact - flow.log_prob(x)).abs().max() < 1e-3
    assert copy.deepcopy(flow).double().sample(3).dtype == torch.float64
