"""An objective or a logger of one's own: one class and one choice on the command line."""

import json

import pytest
from inprocess import flowtrain

from flowtrain.errors import FlowtrainError

MOONS = ("model=realnvp_vector", "dataset=moons")
TINY = ("train", "smoke=true", "report=false", *MOONS, "max_steps=4", "trainer.val_every=2")
MINE = """
from pathlib import Path

from flowtrain.engine.loggers import NullLogger
from flowtrain.engine.objectives import NatsPerRow


class Steps(NullLogger):
    def __init__(self, name="steps.txt"):
        self.name = name

    def open(self, run):
        self.path = run.directory / self.name

    def scalars(self, step, values):
        with self.path.open("a") as file:
            print(step, *values, file=file)


class Nothing:
    pass


class Tempered(NatsPerRow):
    key = "tempered"

    def __init__(self, power=1.0):
        self.power = float(power)

    def loss(self, flow, batch):
        return self.power * super().loss(flow, batch)

    def figure(self, flow, loss):
        return super().figure(flow, loss / self.power)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    for group, text in {"objective": "_target_: mine.Tempered\npower: 0.5\n", "logger": "{}\n"}.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train_run(folder, *words):
    assert flowtrain(folder, *TINY, *words) == 0
    return max(folder.glob("outputs/*/*"), key=lambda run: run.stat().st_mtime)


def test_a_logger_of_ones_own(folder):
    run = train_run(folder, "allow=[mine]", "+logger.mine={_target_: mine.Steps, name: a.txt}", "~logger.tensorboard")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.split() for line in (run / "a.txt").read_text().splitlines()] == [
        [str(row.pop("step")), *row] for row in metrics
    ]
    assert not (run / "tb").exists() and any((run / "samples").iterdir())


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ((), {"metrics.jsonl", "tb", "samples"}),
        (("logger=none",), {"metrics.jsonl", "samples"}),
        (("logger=[]",), {"metrics.jsonl", "samples"}),
        (("logger.tensorboard=null",), {"metrics.jsonl", "samples"}),
        (("logger=csv",), {"metrics.jsonl", "samples", "scalars.csv"}),
        (("logger=[csv,tensorboard]",), {"metrics.jsonl", "samples", "tb", "scalars.csv"}),
    ],
)
def test_loggers_are_chosen(folder, words, left):
    run = train_run(folder, *words)
    assert {name for name in ("metrics.jsonl", "tb", "samples", "scalars.csv") if (run / name).exists()} == left


def test_without_loggers_a_run_still_resumes(folder):
    run = train_run(folder, "--config-dir", "conf", "logger=mine")
    assert not {"scalars.csv", "tb"} & {path.name for path in run.iterdir()}
    assert flowtrain(folder, "train", f"resume={run}", "max_steps=6") == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


def test_an_objective_of_ones_own(folder):
    run = train_run(folder, "--config-dir", "conf", "allow=[mine]", "objective=mine")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train/tempered", "val/tempered"} <= {key for row in metrics for key in row}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("allow=[mine]", "+logger.mine={_target_: mine.Tempered}"), r"logger\.mine: Tempered is no logger"),
        (("+logger.mine={_target_: mine.Steps}",), "_target_ mine.Steps is not allowed"),
        (
            ("allow=[mine]", "objective._target_=mine.Nothing"),
            "objective: Nothing is no flowtrain.engine.objectives.Objective",
        ),
        (("allow=[mine]", "objective._target_=mine.Tempered", "+objective.power=high"), "objective: .*high"),
    ],
)
def test_what_is_no_logger_or_objective_is_refused(folder, words, says):
    with pytest.raises(FlowtrainError, match=says) as caught:
        flowtrain(folder, *TINY, *words)
    assert caught.value.exit_code == 2
