"""dataset=simulator: simulations of a user's own function, kept on disk, and the posterior that is fitted to them."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pandas as pd
import pytest
import torch
from inprocess import flowtrain

from flowtrain.cli.exit_codes import WorkerError
from flowtrain.data.simulations.prior import Product
from flowtrain.data.simulations.store import Block, Store, gather
from flowtrain.data.simulator import Simulator
from flowtrain.errors import FlowtrainError, UsageError

SOURCE = """
import numpy as np
import torch

def prior():
    return torch.distributions.Uniform(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 3.0]))

def simulate(theta):
    if theta[0] > 0.9:
        raise ValueError("too hot")
    if theta[0] < -0.9:
        return [float("nan"), 0.0, 0.0]
    return [float(theta[0]) + 0.1 * np.random.normal(), theta[1] + 0.1 * torch.randn(()), 1.0]

def together(theta):
    return theta + 0.1 * torch.randn_like(theta)

def ragged(theta):
    return [0.0] * (2 if theta[0] < 0.8 else 3)

def never(theta):
    raise ValueError("too cold")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with simulators, in the working directory."""
    monkeypatch.chdir(tmp_path)
    name = f"simulators_{uuid.uuid4().hex}"  # modules are imported once in a process
    (tmp_path / f"{name}.py").write_text(SOURCE)
    return name


def simulator(module, simulate="simulate", **keys):
    found = __import__(module)
    data = Simulator(
        **{"prior": f"{module}:prior", "simulate": f"{module}:{simulate}", "rows": 400, "workers": 2, **keys}
    )
    data.use_functions(lambda key, given: getattr(found, given.partition(":")[2]))
    return data


def rows_of(data):
    """All rows, θ and x in its own units, in the order of the splits."""
    splits = [data.split(name) for name in ("train", "val", "test")]
    given = splits[0].columns.context
    mean, std = (torch.tensor([getattr(column, key) for column in given]) for key in ("mean", "std"))
    return torch.cat([split.data for split in splits]), torch.cat([split.context * std + mean for split in splits])


@pytest.fixture(autouse=True)
def importable(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))


def test_failures_are_left_out_and_counted(module, caplog):
    data = simulator(module)
    theta, x = rows_of(data)
    assert data.spec.shape == (2,) and data.spec.context_shape == (3,)
    assert 330 < len(theta) < 390 and (theta[:, 0].abs() <= 0.9).all()  # a tenth of [−1, 1] fails
    assert f"{400 - len(theta)} of 400 simulations failed" in caplog.text
    assert "too hot" in caplog.text or "NaN" in caplog.text
    assert (x[:, :2] - theta).std(0).sub(0.1).abs().max() < 0.02  # noise of numpy and of torch
    assert torch.unique(x[:, 0]).numel() == len(x), "workers share their random numbers"
    assert (x[:, 2] == 1).all()  # a number that never changes is kept


@pytest.mark.parametrize("keys", [{}, {"simulate": "together", "batched": True}])
def test_rows_depend_on_the_seed_alone(module, tmp_path, keys):
    first = rows_of(simulator(module, root="one", workers=1, **keys))
    again = rows_of(simulator(module, root="two", workers=3, **keys))
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    other = rows_of(simulator(module, root="one", split_seed=1, **keys))
    assert not torch.equal(first[0][:300], other[0][:300])


def test_more_rows_need_only_those_that_are_missing(module, tmp_path, caplog):
    caplog.set_level("INFO")
    few, many = rows_of(simulator(module, rows=300)), rows_of(simulator(module, rows=500))
    assert "simulating 300 rows" in caplog.text and "simulating 200 rows" in caplog.text
    assert {*map(tuple, few[0].tolist())} < {*map(tuple, many[0].tolist())}
    caplog.clear()
    rows_of(simulator(module, rows=500))
    assert "simulating" not in caplog.text
    (folder,) = (tmp_path / "data" / "simulations").iterdir()
    assert [path.name for path in folder.glob("*.npz")] == ["000000000-000000500.npz"]


def test_two_runs_at_once_share_their_simulations(module, tmp_path):
    (tmp_path / f"{module}.py").write_text(
        "import os\ndef simulate(theta):\n    with open('calls', 'a') as file:\n"
        "        print(os.getppid(), file=file)\n    return theta\n"
    )
    made = {"prior": {"a": [0, 1]}, "workers": 1}

    def run(rows, barrier):
        data = simulator(module, rows=rows, **made)
        data.find()
        barrier.wait()
        torch.save(rows_of(data), f"{rows}.pt")

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    runs = [context.Process(target=run, args=(rows, barrier)) for rows in (300, 400)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(60)
        assert process.exitcode == 0
    calls = (tmp_path / "calls").read_text().split()
    assert sum(calls.count(str(process.pid)) for process in runs) == 400
    for rows in (300, 400):
        alone = rows_of(simulator(module, rows=rows, root=f"alone{rows}", **made))
        assert all(map(torch.equal, torch.load(f"{rows}.pt"), alone))


def test_what_another_run_merges_can_still_be_read(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    for first in (0, 10, 20):
        x = np.arange(first, first + 10, dtype=np.float32)[:, None]
        store.write(Block(first, x, x, ""))
    read = Store._read

    def merged_meanwhile(self, first, stop):
        monkeypatch.setattr(Store, "_read", read)
        Store(store.folder).merge(30)
        return read(self, first, stop)

    monkeypatch.setattr(Store, "_read", merged_meanwhile)
    assert gather(store.read(25))[0].flatten().tolist() == [*range(25)]
    assert [path.name for path in store.folder.glob("*.npz")] == ["000000000-000000030.npz"]
    with pytest.raises(FlowtrainError, match="lacks simulations"):
        store.read(31)


def test_another_source_or_prior_is_simulated_anew(module, tmp_path):
    rows_of(simulator(module))
    (tmp_path / f"{module}.py").write_text(SOURCE + "\nOTHER = 1\n")
    rows_of(simulator(module))
    rows_of(simulator(module, prior={"a": [0, 1], "b": [0, 1]}))
    rows_of(simulator(module, prior={"a": [0, 1], "b": {"mean": 0, "std": 1}}))
    assert len([*(tmp_path / "data" / "simulations").iterdir()]) == 4


def test_a_damaged_file_is_named(module, tmp_path):
    rows_of(simulator(module))
    (path,) = tmp_path.glob("data/simulations/*/*.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FlowtrainError, match=f"{path.name}: damaged"):
        rows_of(simulator(module))


def test_another_number_of_numbers_is_a_failure(module, caplog):
    theta, x = rows_of(simulator(module, "ragged"))
    assert x.shape[1] == 2 and 0.7 < theta[:, 0].max() < 0.8
    assert "the first: it returned 3 numbers, not 2" in caplog.text


def test_when_all_fail_the_reason_is_said(module):
    with pytest.raises(FlowtrainError, match="first 100 simulations failed: ValueError: too cold"):
        simulator(module, "never").split("train")


def test_a_store_knows_its_gaps_and_reads_each_row_once(tmp_path):
    store = Store(tmp_path / "store")

    def block(first, stop):
        numbers = np.arange(first, stop, dtype=np.float32)
        return Block(first, numbers[:, None], np.repeat(numbers[:, None], 2, 1), "")

    assert store.missing(10) == [(0, 10)]
    for ends in ((0, 3), (2, 5), (8, 12)):
        store.write(block(*ends))
    assert store.missing(10) == [(5, 8)] and store.missing(4) == [] and store.missing(20) == [(5, 8), (12, 20)]
    store.write(Block(5, block(5, 8).theta, np.full((3, 2), np.nan, np.float32), "no"))
    theta, x, failed, _ = gather(store.read(11))
    assert theta[:, 0].tolist() == [0, 1, 2, 3, 4, 8, 9, 10] and failed == 3 and x.shape == (8, 2)
    store.merge(12)
    assert len([*store.folder.iterdir()]) == 1 and store.missing(12) == []
    assert gather(store.read(11))[0].tolist() == theta.tolist()


def test_a_prior_by_names():
    torch.manual_seed(0)
    prior = Product({"rate": [0.1, 0.7], "shift": {"mean": 5, "std": 2}})
    theta = prior.sample((5000,))
    assert prior.names == ["rate", "shift"] and theta.dtype == torch.float32
    assert theta[:, 0].min() >= 0.1 and theta[:, 0].max() <= 0.7 and abs(theta[:, 0].mean() - 0.4) < 0.02
    assert abs(theta[:, 1].mean() - 5) < 0.15 and abs(theta[:, 1].std() - 2) < 0.1


@pytest.mark.parametrize(
    "prior",
    [{}, {"a": [1, 0]}, {"a": [1]}, {"a": 3}, {"a": {"mean": 0, "std": 0}}, {"a": {"mean": 0}}, {"a": ["x", 1]}],
)
def test_priors_that_are_none(prior):
    with pytest.raises(UsageError, match="dataset.prior"):
        Product(prior)


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"simulate": "module"}, "module:function"),
        ({"prior": 3}, "mapping"),
        ({"rows": 5}, "rows"),
        ({"workers": 0}, "workers"),
        ({"batched": 1}, "true or false"),
        ({"names": ["a", "a"]}, "different"),
    ],
)
def test_wrong_keys_are_refused(keys, word):
    with pytest.raises(UsageError, match=word):
        Simulator(**keys)


# ---- the commands

SMALL = ("model=maf", "dataset=simulator", "smoke=true", "report=false", "dataset.rows=300")


def train_words(module, *more):
    given = f"dataset.simulate={module}:simulate", f"dataset.prior={module}:prior", f"allow=[{module}]"
    return "train", *SMALL, *given, *more


@pytest.mark.slow
def test_every_command_on_a_run_of_a_simulator(tmp_path, module):
    names = "dataset.names=[rate,size]", "dataset.observed=[u,v,w]"
    assert flowtrain(tmp_path, *train_words(module, *names, "hydra.run.dir=run")) == 0

    (tmp_path / f"{module}.py").unlink()  # nothing of the user's is imported from here on
    sys.modules.pop(module, None)
    assert flowtrain(tmp_path, "eval", "ckpt=run") == 0
    (tmp_path / "observed.csv").write_text("u,v,w\n0.5,2.9,1\n-0.2,0.05,1\n")
    assert flowtrain(tmp_path, "sample", "ckpt=run", "context=observed.csv", "n=50", "output=s.csv", "plot=false") == 0
    samples = pd.read_csv(tmp_path / "s.csv")
    assert list(samples) == ["u", "v", "w", "rate", "size", "row"] and len(samples) == 100
    assert samples["rate"].between(-1, 1).all() and samples["size"].between(0, 3).all()
    (tmp_path / "rows.csv").write_text("rate,size,u,v,w\n0.5,2.5,0.5,2.9,1\n")
    assert flowtrain(tmp_path, "score", "ckpt=run", "input=rows.csv", "output=scores.csv") == 0
    assert np.isfinite(pd.read_csv(tmp_path / "scores.csv").iloc[:, -1]).all()
    assert flowtrain(tmp_path, "check", "ckpt=run") == 0
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=5") == 0
    assert flowtrain(tmp_path, "rerun", "run") == 0


def test_a_run_whose_simulator_has_changed(tmp_path, module):
    assert flowtrain(tmp_path, *train_words(module, "hydra.run.dir=run")) == 0
    for path in tmp_path.glob("data/simulations/*/*"):
        path.unlink()
    with pytest.raises(WorkerError, match=re.escape(f"allow=[{module}]")):
        flowtrain(tmp_path, "eval", "ckpt=run")
    assert flowtrain(tmp_path, "eval", "ckpt=run", f"allow=[{module}]") == 0  # simulated once more
    for path in tmp_path.glob("data/simulations/*/*"):
        path.unlink()
    (tmp_path / f"{module}.py").write_text(SOURCE + "\n# other\n")
    sys.modules.pop(module)
    with pytest.raises(WorkerError, match="has changed since the run began"):
        flowtrain(tmp_path, "eval", "ckpt=run", f"allow=[{module}]")


def test_what_is_refused_says_what_would_be_right(tmp_path, module):
    given = f"dataset.simulate={module}:simulate", f"dataset.prior={module}:prior"
    for words, line in (
        (given, f"allow=[{module}]"),
        ((*given[1:], f"allow=[{module}]"), "dataset.simulate: module:function"),
        ((*given[:1], f"allow=[{module}]"), "dataset.prior: a mapping"),
        ((*given, f"allow=[{module}]", f"dataset.simulate={module}:simulat"), "did you mean simulate?"),
        ((*given, f"allow=[{module}]", "dataset.names=[a]"), "the prior has 2 parameters"),
        ((*given, f"allow=[{module}]", "dataset.observed=[a]"), "a simulation has 3 numbers"),
        ((*given, f"allow=[{module}]", "dataset.observed=[theta0,b,c]"), "name of a parameter too"),
    ):
        with pytest.raises(WorkerError, match=re.escape(line)) as caught:
            flowtrain(tmp_path, "train", *SMALL, *words)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_simulated(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(
        "import time\ndef simulate(theta):\n    time.sleep(0.01)\n    return theta\n"
    )
    words = f"dataset.simulate={module}:simulate", "dataset.prior={a: [0, 1]}", f"allow=[{module}]", "dataset.rows=2000"
    process = subprocess.Popen(
        [sys.executable, "-m", "flowtrain", "train", *SMALL, *words, "hydra.run.dir=run"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 60
    while len([*tmp_path.glob("data/simulations/*/*.npz")]) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read().strip().splitlines()[-1] == "flowtrain: interrupted by SIGINT"
    (folder,) = tmp_path.glob("data/simulations/*")
    kept = {path.name for path in folder.iterdir()}
    assert len(kept) >= 2 and not any(name.endswith(".tmp") for name in kept)
    assert Store(folder).missing(2000) not in ([], [(0, 2000)])


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(
        "import os, time\n"
        "def simulate(theta):\n"
        "    open(f'pid{os.getpid()}', 'w').close()\n"
        "    time.sleep(0.01)\n"
        "    return theta\n"
    )
    words = f"dataset.simulate={module}:simulate", "dataset.prior={a: [0, 1]}", f"allow=[{module}]", "dataset.rows=9000"
    process = subprocess.Popen(
        [sys.executable, "-m", "flowtrain", "train", *SMALL, *words, "dataset.workers=2", "hydra.run.dir=run"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 90
    while len([*tmp_path.glob("pid*")]) < 3 and time.monotonic() < end:  # the process's own, and its workers'
        time.sleep(0.05)
    process.kill()
    process.wait()
    workers = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    assert len(workers) >= 3
    while any(map(_runs, workers)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    """Whether there is such a process, and it has not ended as a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_posterior_of_a_run_is_the_true_one(tmp_path, module):
    """x = θ + N(0, 0.3²) under a uniform prior: the posterior is a normal distribution, cut off at the bounds."""
    (tmp_path / f"{module}.py").write_text(
        "import torch\ndef simulate(theta):\n    return theta + 0.3 * torch.randn_like(theta)\n"
    )
    words = f"dataset.simulate={module}:simulate", "dataset.batched=true", "dataset.prior={a: [0, 1]}"
    more = "dataset.rows=8000", "max_steps=300", "hydra.run.dir=run", "report=false", f"allow=[{module}]"
    assert (
        flowtrain(
            tmp_path,
            "train",
            "model=nsf_autoregressive",
            "model.hidden=16",
            "model.steps=1",
            "model.blocks=1",
            "dataset=simulator",
            *words,
            *more,
        )
        == 0
    )
    (tmp_path / "observed.csv").write_text("x0\n0.5\n1.1\n")
    flowtrain(tmp_path, "sample", "ckpt=run", "context=observed.csv", "n=4000", "output=s.csv", "plot=false")
    grid = np.linspace(0, 1, 2001)
    for row, of in pd.read_csv(tmp_path / "s.csv").groupby("row"):
        density = np.exp(-((grid - {1: 0.5, 2: 1.1}[row]) ** 2) / (2 * 0.09))
        cumulative = np.cumsum(density) / density.sum()
        quantiles = np.quantile(of["a"], [0.1, 0.5, 0.9])
        assert np.abs(np.interp(quantiles, grid, cumulative) - [0.1, 0.5, 0.9]).max() < 0.04
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["log_likelihood"] > 0
