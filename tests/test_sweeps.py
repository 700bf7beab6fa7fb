"""Sweeps: the same command again, searches, the picture, the ready search, and other launchers."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inprocess import flowtrain
from joblib.externals.loky import get_reusable_executor
from omegaconf import OmegaConf
from PIL import Image

from flowtrain.cli import checks, jobs, launcher, sweep, worker
from flowtrain.errors import UsageError
from flowtrain.plots.sweep import plot_sweep
from flowtrain.runtime import status

ROOT = Path(__file__).resolve().parent.parent
TINY = ("train", "--multirun", "smoke=true", "logger=none", "max_steps=1", "model=nice", "trainer.sample_every=null")
NOWHERE = ("dataset.root=nowhere", "dataset.download=false")


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Jobs in this process and words that are not checked first, to save the seconds that both take; except where a
    test is marked ``workers``, or about the checks."""
    if "workers" in request.keywords:
        return

    def launch(job, count, timeout, jobs=1):
        return worker.execute(**{key: value for key, value in job.items() if key != "logging_config"})

    monkeypatch.setattr(launcher, "launch", launch)
    if "refused" not in request.node.name:
        monkeypatch.setattr(checks, "check", lambda *_: checks.Checked(False, None))


def only_sweep(folder) -> Path:
    (found,) = (folder / "outputs/sweeps").iterdir()
    return found


def rows(folder) -> list[dict]:
    with open(only_sweep(folder) / "results.csv", newline="") as file:
        return [*csv.DictReader(file)]


def runs(folder) -> set[str]:
    return {path.name for path in only_sweep(folder).iterdir() if path.is_dir()}


# ---- the same command again ----------------------------------------------------------------------------------------


def test_finished_jobs_are_skipped_and_failed_ones_repeated(tmp_path, capfd):
    assert flowtrain(tmp_path, *TINY, *NOWHERE, "dataset=mnist,digits", "seed=1") == 1
    assert [row["status"] for row in rows(tmp_path)] == ["failed", "finished"]
    kept = only_sweep(tmp_path) / "1_digits-nice/metrics.jsonl"
    changed = kept.stat().st_mtime_ns
    capfd.readouterr()
    assert flowtrain(tmp_path, *TINY, "seed=1", *NOWHERE, "dataset=mnist,digits") == 1  # in another order
    err = capfd.readouterr().err
    assert err.count("job 1: finished before, skipped") == 1 and err.count("job 0: dataset=mnist") == 1
    assert [(row["job"], row["status"]) for row in rows(tmp_path)] == [("0", "failed"), ("1", "finished")]
    assert runs(tmp_path) == {"0_mnist-nice", "0_mnist-nice_2", "1_digits-nice"}
    assert kept.stat().st_mtime_ns == changed


def test_a_sweep_that_has_finished_trains_nothing_and_mixes_with_no_other(tmp_path, capfd, monkeypatch):
    words = (*TINY, "seed=1,2")
    assert flowtrain(tmp_path, *words) == 0
    before, table = runs(tmp_path), rows(tmp_path)
    assert "sweep.png" in capfd.readouterr().out and (only_sweep(tmp_path) / "sweep.png").is_file()
    monkeypatch.setitem(sys.modules, "flowtrain.plots.sweep", None)  # as without matplotlib
    assert flowtrain(tmp_path, *words, "launcher=local") == 0
    told = capfd.readouterr()
    assert "every job had finished before; hydra.sweep.dir=DIR runs them anew" in told.out and "results.csv" in told.out
    assert "step 1" not in told.out and runs(tmp_path) == before and rows(tmp_path) == table
    assert "pip install 'flowtrain[plots]'" in told.out
    with status.lock_file(only_sweep(tmp_path)), pytest.raises(UsageError, match="is being run by process"):
        flowtrain(tmp_path, *words)
    given = f"hydra.sweep.dir={only_sweep(tmp_path)}"
    assert flowtrain(tmp_path, *words, given) == 0 and runs(tmp_path) == before
    with pytest.raises(UsageError, match="hydra.sweep.dir=.*: holds a sweep of another command"):
        flowtrain(tmp_path, *TINY, "seed=5,6", given)
    assert flowtrain(tmp_path, *TINY, "seed=1,3") == 0
    assert len([*(tmp_path / "outputs/sweeps").iterdir()]) == 2


def test_jobs_that_left_no_row_run(tmp_path, capfd):
    words = (*TINY, "seed=1,2,3")
    assert flowtrain(tmp_path, *words) == 0
    file = only_sweep(tmp_path) / "results.csv"
    kept = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith(("0,", "2,"))]
    file.write_text("".join(kept) + "2,model=nice se")  # killed in the middle, and while it wrote
    capfd.readouterr()
    assert flowtrain(tmp_path, *words) == 0
    assert capfd.readouterr().err.count("skipped") == 1
    assert [row["job"] for row in rows(tmp_path)] == ["0", "1", "2"]
    assert {f"{n}_digits-nice_2" for n in (0, 2)} == runs(tmp_path) - {f"{n}_digits-nice" for n in (0, 1, 2)}


def test_a_job_whose_configuration_has_changed_runs_again(tmp_path, capfd):
    assert flowtrain(tmp_path, *TINY, "seed=1,2") == 0
    stored = only_sweep(tmp_path) / "1_digits-nice/.hydra/config.yaml"
    stored.write_text(stored.read_text().replace("hidden: 64", "hidden: 63").replace("depth: ", "depth: 1"))
    capfd.readouterr()
    assert flowtrain(tmp_path, *TINY, "seed=1,2") == 0
    assert capfd.readouterr().err.count("skipped") == 1 and "1_digits-nice_2" in runs(tmp_path)


def test_an_evaluation_is_repeated_once_it_has_finished(tmp_path):
    assert flowtrain(tmp_path, *TINY, "seed=1,2", "hydra.sweep.dir=trained") == 0
    pair = ",".join(f"trained/{n}_digits-nice" for n in (0, 1))
    for _ in range(2):
        assert flowtrain(tmp_path, "eval", "--multirun", f"ckpt={pair}", "examples=20", "draws=1") == 0
    first, second = sorted((tmp_path / "outputs/sweeps").iterdir())
    assert (second / "results.csv").read_text().count("finished") == 2


@pytest.mark.slow
@pytest.mark.workers
def test_a_sweep_that_was_killed_goes_on(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flowtrain", *TINY, "seed=1,2,3"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not [*tmp_path.glob("outputs/sweeps/*/results.csv")] and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its worker ends, too
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 1 <= done.stderr.count("finished before, skipped") < 3, done.stderr
    assert [(row["job"], row["status"]) for row in rows(tmp_path)] == [(n, "finished") for n in "012"]


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize("words", [("launcher=joblib",), ("hydra/launcher=submitit_local",)])
def test_other_launchers_repeat_only_what_is_missing(tmp_path, words, capfd):
    words = (*TINY, "seed=1,2,3", *words)
    assert flowtrain(tmp_path, *words) == 0
    file = only_sweep(tmp_path) / "results.csv"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if line[0] not in "02"))
    get_reusable_executor().shutdown()  # joblib's processes, which end with a command
    assert flowtrain(tmp_path, *words) == 0
    assert [(row["job"], row["status"]) for row in rows(tmp_path)] == [(n, "finished") for n in "012"]
    assert {f"{n}_digits-nice_2" for n in (0, 2)} <= runs(tmp_path) and "1_digits-nice_2" not in runs(tmp_path)
    assert capfd.readouterr().err.count("job 1: finished before, skipped") == 1


def test_each_value_of_a_limit_is_a_job(tmp_path):
    assert flowtrain(tmp_path, *TINY, "max_steps=1,2") == 0
    assert [row["steps"] for row in rows(tmp_path)] == ["1", "2"]


# ---- searches ------------------------------------------------------------------------------------------------------

SEARCH = ("hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "optimizer.lr=tag(log,interval(1e-4,1e-2))")


def test_a_search_minimizes_the_figure_and_goes_on(tmp_path, capfd):
    pytest.importorskip("optuna")
    words = (*TINY, *SEARCH, "model.pairs=choice(1,2)")
    assert flowtrain(tmp_path, *words, "hydra.sweeper.n_trials=3") == 0
    first = rows(tmp_path)
    assert len(first) == 3 and all(1e-4 <= float(dict_of(row)["optimizer.lr"]) <= 1e-2 for row in first)
    best = (only_sweep(tmp_path) / "optimization_results.yaml").read_text()
    assert f"best_value: {min(float(row['bits_per_dim']) for row in first)}" in best
    capfd.readouterr()
    assert flowtrain(tmp_path, *words, "hydra.sweeper.n_trials=4") == 0
    assert capfd.readouterr().err.count("finished before, skipped") == 3
    assert rows(tmp_path)[:3] == first and len(rows(tmp_path)) == 4


def test_a_search_in_which_every_job_fails_says_so(tmp_path, capfd):
    pytest.importorskip("optuna")
    words = (*TINY, *SEARCH, *NOWHERE, "dataset=mnist", "hydra.sweeper.n_trials=2")
    assert flowtrain(tmp_path, *words) == 1
    told = capfd.readouterr()
    assert told.err.count("flowtrain: job") == 2 and "float-castable" not in told.err and "Traceback" not in told.err
    assert [row["status"] for row in rows(tmp_path)] == ["failed", "failed"]


def test_a_tables_figure_is_its_negative_likelihood():
    assert sweep.figure({"bits_per_dim": 3.0, "log_likelihood": -5.0}) == 3.0
    assert sweep.figure({"bits_per_dim": "", "log_likelihood": "-5.5"}) == 5.5
    assert sweep.figure({"log_likelihood": None}) is None


def dict_of(row) -> dict:
    return dict(word.split("=", 1) for word in row["overrides"].split(" "))


@pytest.mark.parametrize(
    "words, says",
    [
        (("seed=interval(1,2)",), "needs a search, such as hydra/sweeper=optuna"),
        (("hydra/sweeper=optuna", "model.stepz=choice(1,2)"), "no key 'model.stepz'"),
        (("hydra/sweeper=optuna", "model.pairs=choice(1,two)"), "model.pairs=two: must be a number"),
        (("sweep=digits_quik",), "did you mean 'digits_quick'?"),
        (("--config-dir", "mine", "sweep=typo"), "no key 'model.stepz'"),
        (("--config-dir", "mine", "sweep=value"), "trainer.clip=high: must be a number"),
        (("--config-dir", "mine", "sweep=key"), "sweep/key.yaml: no key 'max_stepz'"),
    ],
)
def test_a_mistake_in_a_sweep_is_refused_at_once(tmp_path, words, says):
    (tmp_path / "mine/sweep").mkdir(parents=True)
    for name, key, values in (("typo", "model.stepz", "1,2"), ("value", "trainer.clip", "1.0,high")):
        lines = ("# @package _global_", "hydra:", "  sweeper:", "    params:", f"      {key}: {values}")
        (tmp_path / f"mine/sweep/{name}.yaml").write_text("\n".join(lines))
    (tmp_path / "mine/sweep/key.yaml").write_text("# @package _global_\nmax_stepz: 3\n")
    with pytest.raises(UsageError) as caught:
        flowtrain(tmp_path, *TINY, *words)
    assert says in str(caught.value) and not (tmp_path / "outputs").exists()


def test_a_ready_search_needs_no_multirun_and_is_not_refused(tmp_path, monkeypatch):
    seen = []
    note = lambda command, cfg, *_: seen.append((cfg.model._target_, cfg.optimizer.lr, cfg.max_minutes)) or {}
    monkeypatch.setattr(jobs, "_run", note)
    assert flowtrain(tmp_path, "train", "sweep=digits_quick", "model=nice") == 0
    assert seen == [("flowtrain.flows.nice", rate, 0.6) for rate in (1e-3, 3e-3)]
    params = OmegaConf.load(ROOT / "conf/sweep/digits_quick.yaml").hydra.sweeper.params
    jobs_of_all = math.prod(len(values.split(",")) for values in params.values())
    assert jobs_of_all == 8 and jobs_of_all * seen[0][2] < 6  # minutes of training; below ten with all else


# ---- the picture ---------------------------------------------------------------------------------------------------


def test_the_picture_has_a_panel_for_each_key_and_marks_the_best(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    columns = {
        "model": ["nice", "glow", "nice", "glow"],
        "optimizer.lr": ["1e-4", "1e-4", "1e-2", "1e-2"],
        "n": [*"1212"],
    }
    plot_sweep(tmp_path / "a.png", columns, [3.0, 2.0, 4.0, 2.5], [0.1, None, 0.1, 0.1], "bits_per_dim", True)
    model, rate, number = drawn[0].axes
    assert [tick.get_text() for tick in model.get_xticklabels()] == ["glow", "nice"]
    assert (model.get_xscale(), rate.get_xscale(), number.get_xscale()) == ("linear", "log", "linear")
    for panel in drawn[0].axes:
        (star,) = [line for line in panel.lines if line.get_marker() == "*"]
        assert star.get_ydata() == [2.0]
    assert "★ the best: 2.0000" in drawn[0].get_suptitle() and Image.open(tmp_path / "a.png").width > 1000
    plot_sweep(tmp_path / "b.png", {"n": ["2", "3"]}, [3.0, 2.0], [None, None], "log_likelihood", False, {"n"})
    assert drawn[1].axes[0].get_xscale() == "log" and "best: 3.0000" in drawn[1].get_suptitle()
