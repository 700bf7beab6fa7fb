"""``flowtrain rerun``: the same run again, to the bit, and a line for each thing that differs."""

import json
import shutil

import pytest
import torch
from inprocess import flowtrain

from flowtrain.engine.threads import KEPT, RepeatedThreads, Threads
from flowtrain.errors import UsageError
from flowtrain.runtime import checkpoint, environment

WORDS = ["train", "model=realnvp_vector", "model.hidden=8", "model.pairs=1", "dataset=moons", "dataset.rows=500"]
WORDS += ["batch_size=16", "max_steps=4", "logger=none", "trainer.sample_every=null", "trainer.ema=0.5"]


@pytest.fixture
def clean(monkeypatch):
    """A checkout without changes, whatever it is."""
    monkeypatch.setattr(environment, "_commit", lambda: "0123456789abcdef")


@pytest.fixture
def run(tmp_path, clean):
    assert flowtrain(tmp_path, *WORDS) == 0
    (found,) = tmp_path.glob("outputs/moons-realnvp_vector/*")
    return found


def newest(folder):
    return max(folder.glob("outputs/*/*"), key=lambda path: path.stat().st_mtime_ns)


def weights(run):
    state = checkpoint.read(run / "checkpoints/last.pt")
    return {**state["model"], **{f"ema.{name}": value for name, value in state["ema"].items()}}


def equal(one, two):
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_repeated_to_the_bit_from_another_folder(run, tmp_path, capfd):
    moved = shutil.move(run, tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    assert flowtrain(tmp_path / "elsewhere", "rerun", str(moved)) == 0
    out = capfd.readouterr().out
    assert f"repeats {moved}\nnothing differs: the weights will be the same to the bit\n" in out
    (again,) = (tmp_path / "elsewhere").glob("outputs/reruns/*")
    assert equal(moved, again)
    assert flowtrain(tmp_path / "elsewhere", "rerun", f"run={moved}/checkpoints/last.pt") == 0  # one file is enough
    assert equal(moved, newest(tmp_path / "elsewhere"))


def test_what_differs_is_said_line_by_line(run, tmp_path, capfd, monkeypatch):
    file = run / "environment.json"
    then = json.loads(file.read_text())
    then |= {"git": "fedcba", "python": "3.0", "packages": then["packages"] | {"torch": "1.0"}}
    file.write_text(json.dumps(then))
    monkeypatch.setattr(environment, "_commit", lambda: "0123456789abcdef-dirty")
    assert flowtrain(tmp_path, "rerun", "seed=2", "max_steps=5", "dataset.root=other") == 0  # the newest
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("differs: ")]
    now = environment.describe(torch.device("cpu"))
    assert lines == [
        "differs: max_steps=5, then 4",
        "differs: seed=2, then 1",
        "differs: commit 0123456789abcdef, then fedcba",
        "differs: the code had changes beyond its commit now, which may not be the same",
        f"differs: python {now['python']}, then 3.0",
        f"differs: torch {now['packages']['torch']}, then 1.0",
    ]
    again = newest(tmp_path)
    assert again.parent == run.parent and not equal(run, again)
    assert checkpoint.read_config(again / "checkpoints/last.pt")["seed"] == 2


def test_data_that_changed_and_a_missing_record_are_said(tmp_path, clean, capfd):
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{i % 7 + i / 100},{i * i % 11 + 0.5}\n" for i in range(60)))
    words = ["train", "model=maf", "model.hidden=8", "model.steps=1", "dataset=table", "dataset.path=t.csv"]
    assert flowtrain(tmp_path, *words, "max_steps=2", "logger=none", "hydra.run.dir=first") == 0
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("5.05", "5.06"))
    (tmp_path / "first/environment.json").unlink()
    assert flowtrain(tmp_path, "rerun", "first") == 0
    out = capfd.readouterr().out
    assert "differs: the train split, whose SHA-256 is " in out
    assert "differs: unknown: there is no environment.json that says commit and versions" in out


def test_a_run_that_ended_before_its_first_checkpoint_is_repeated(run, tmp_path, capfd):
    shutil.rmtree(run / "checkpoints")
    (run / "environment.json").write_text(json.dumps(json.loads((run / "environment.json").read_text())))
    assert flowtrain(tmp_path, "rerun", str(run)) == 0
    assert "nothing differs" in capfd.readouterr().out
    assert torch.isfinite(next(iter(weights(newest(tmp_path)).values()))).all()
    assert checkpoint.read_config(newest(tmp_path) / "checkpoints/last.pt")["max_steps"] == 4


@pytest.mark.slow
def test_a_job_of_a_sweep_is_repeated_beside_other_runs(tmp_path, clean):
    assert flowtrain(tmp_path, *WORDS, "--multirun", "seed=3,4", "hydra.sweep.dir=sweep") == 0
    assert flowtrain(tmp_path, "rerun", "sweep/1_moons-realnvp_vector") == 0
    (again,) = tmp_path.glob("outputs/moons-realnvp_vector/*")
    assert equal(tmp_path / "sweep/1_moons-realnvp_vector", again)
    with pytest.raises(UsageError, match="run=sweep: holds runs; name one of them, such as sweep/[01]_moons"):
        flowtrain(tmp_path, "rerun", "sweep")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "run=nothing: no such file or directory"),
        (["empty"], "run=empty: not a run directory: it has neither checkpoints nor .hydra/config.yaml"),
        ([], "there is no run under outputs/ here: give run=PATH"),
        (["empty", "run=empty"], "give one of these, not both: run=empty run=empty"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, words, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        flowtrain(tmp_path, "rerun", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_data_and_groups_of_a_rerun_are_fixed(run, tmp_path):
    for word, says in (
        ("dataset.rows=7", "dataset.rows is fixed by the checkpoint: a rerun keeps"),
        ("model=maf", "model is fixed by the checkpoint: a rerun keeps"),
        ("logger=csv", "logger is fixed by the checkpoint: a rerun keeps"),
        ("resume=true", "flowtrain rerun starts anew"),
        ("sed=1", "did you mean 'seed'"),
    ):
        with pytest.raises(UsageError, match=says):
            flowtrain(tmp_path, "rerun", str(run), word)


def test_a_run_that_goes_on_by_its_path_keeps_its_choices(run, tmp_path):
    for word, says in (
        ("logger=csv", "logger: resume=PATH keeps those of the run; its own command with resume=true"),
        ("scheduler=constant", "scheduler: resume=PATH keeps that of the run; single keys"),
    ):
        with pytest.raises(UsageError, match=says):
            flowtrain(tmp_path, "train", f"resume={run}", word)


def test_a_record_that_asks_for_values_from_elsewhere_is_refused(run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    file = run / ".hydra/config.yaml"
    file.write_text(file.read_text().replace("init: null", "init: ${oc.env:HOME}"))
    with pytest.raises(Exception, match="config.yaml: its configuration is refused: it holds an interpolation"):
        flowtrain(tmp_path, "rerun", str(run))


def test_threads_take_the_turns_of_the_first_run():
    used, now = [], [0]
    first = Threads([2, 1], lambda number: now.__setitem__(0, number))
    first.start()
    for _ in range(40):
        used.append(now[0])
        first.after_step({2: 0.10, 1: 0.12}[now[0]])
    assert len({*used}) == 2 and first.chosen == 2
    again, repeated = [], RepeatedThreads(first.turns, lambda number: now.__setitem__(0, number))
    repeated.start()
    for step in range(40):
        again.append(now[0])
        repeated.after_step(step % 3)
    assert again == used and repeated.turns == first.turns and len(first.turns) * (1 + KEPT) < 40
