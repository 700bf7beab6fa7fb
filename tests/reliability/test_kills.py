"""Promises 1 and 2: a run killed at any moment continues bit for bit, and there is always an intact checkpoint."""

import json
import random
import signal
import time

import kill_points
import pytest
import torch
from forks import are_equal, read_metrics, read_state, runs_in

from flowtrain.config.compose import train_config
from flowtrain.config.conversion import to_dict
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint

WORDS = (
    "train",
    "model=realnvp_vector",
    "model.pairs=1",
    "model.hidden=8",
    "model.dropout=0.1",
    "dataset=moons",
    "dataset.rows=400",
    "batch_size=32",
    "max_steps=45",
    "trainer.warmup_steps=20",
    "trainer.log_every=4",
    "trainer.val_every=7",
    "trainer.sample_every=20",
    "trainer.save_every=9",
    "logger=none",
    "resume=true",
)
SAVES = 5  # saves of last.pt while WORDS trains; one more at its end


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run without a kill, and the seconds of its command and of its training alone."""
    folder = tmp_path_factory.mktemp("whole")
    assert server.run(folder / "first", *WORDS) == 0
    start = time.monotonic()
    assert server.run(folder / "second", *WORDS) == 0
    seconds = time.monotonic() - start
    (run,) = runs_in(folder / "second")
    assert read_results(run) and are_equal(read_results(run), read_results(*runs_in(folder / "first")))
    return run, (seconds, json.loads((run / "summary.json").read_text())["seconds"])


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """``environment(number)``: the environment of a run; four in five need not compose their configuration."""
    file = tmp_path_factory.mktemp("values") / "values.json"
    file.write_text(json.dumps(to_dict(train_config(*WORDS[1:]))))
    return lambda number: {} if number % 5 == 0 else {"VALUES": str(file)}


def read_results(run):
    """Read what a kill must not change: the metrics, the state and the summary's figures."""
    figures = json.loads((run / "summary.json").read_text())
    return read_metrics(run), read_state(run), [figures[key] for key in ("log_likelihood", "steps", "skipped_steps")]


def continues(server, cwd, whole, **env) -> bool:
    """Whether the same command brings a killed run to the results of ``whole``."""
    assert server.run(cwd, *WORDS, **env) == 0
    (run,) = [run for run in runs_in(cwd) if (run / "summary.json").exists()]
    assert not list(run.rglob(".*.tmp"))
    return are_equal(read_results(run), read_results(whole))


def test_a_run_killed_at_any_moment_continues_bit_for_bit(server, whole, environment, tmp_path, count, promise):
    run, seconds = whole
    dice, cases, equal = random.Random(1), count(50), 0
    number = killed = resumed = 0
    while killed < cases:
        number += 1
        assert number < 4 * cases
        cwd = tmp_path / str(number)
        env = environment(number)
        process = server.start(cwd, *WORDS, **env)
        if env:  # a start takes longer than the training itself
            process.wait_until(lambda: any(cwd.glob("outputs/*/*/metrics.jsonl")))
        time.sleep(dice.uniform(0, seconds[bool(env)]))
        process.kill(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
            resumed += any(cwd.glob("outputs/*/*/checkpoints/last.pt"))
            equal += continues(server, cwd, run, **env)
    promise(1, "kills at a random moment, then bit for bit as if there had been none", f"{equal} of {cases}")
    assert equal == cases and resumed


@pytest.mark.parametrize("place", kill_points.PLACES)
def test_a_run_killed_in_a_save_continues_bit_for_bit(server, whole, environment, tmp_path, count, promise, place):
    run, _ = whole
    size = (run / "checkpoints/last.pt").stat().st_size
    dice, cases, equal = random.Random(place), count(10), 0
    for number in range(cases):
        cwd = tmp_path / str(number)
        # pruning needs an old last.pt
        kill = {"place": place, "save": dice.randint(1 + (place == "pruning"), SAVES + 1)}
        kill |= {"byte": dice.randrange(200, size - 2000), "part": (number + dice.randrange(4)) % 4}
        assert server.run(cwd, *WORDS, **environment(number), KILL_AT=json.dumps(kill)) == -signal.SIGKILL
        equal += continues(server, cwd, run, **environment(number))
    promise(1, f"kills {place}, then bit for bit as if there had been none", f"{equal} of {cases}")
    assert equal == cases


def test_a_run_killed_after_its_last_validation_continues_bit_for_bit(server, whole, environment, tmp_path):
    """A validation's line that is not in last.pt is not written twice."""
    kill = {"place": "before rename", "save": SAVES + 1}
    assert server.run(tmp_path, **environment(1), KILL_AT=json.dumps(kill)) == -signal.SIGKILL
    (run,) = runs_in(tmp_path)
    assert read_state(run)["step"] == 45 and "val/log_likelihood" in read_metrics(run)[-1]
    assert continues(server, tmp_path, whole[0], **environment(1))


@pytest.mark.parametrize("part", [*kill_points.OMITTED, None])
def test_each_part_of_the_state_is_needed(server, whole, environment, tmp_path, part):
    """The comparison fails if a resumed run ignores any part."""
    save = SAVES + 1 if part == "records" else 3
    kill = {"place": "before rename", "save": save}
    assert server.run(tmp_path, **environment(1), KILL_AT=json.dumps(kill)) == -signal.SIGKILL
    omitted = {"OMIT": part} if part else {}
    assert continues(server, tmp_path, whole[0], **environment(1), **omitted) is (part is None)


# ---- always one intact checkpoint ------------------------------------------------------------------------------------


def read_step(file):
    """Read the step of a checkpoint, which all of its parts hold."""
    found = checkpoint.read(file)
    assert torch.equal(found["x"], torch.full((20_000,), found["step"]))
    return found["step"]


@pytest.mark.parametrize("place", ["any", "no links"])
def test_a_reader_always_finds_an_intact_checkpoint(server, tmp_path, count, promise, place):
    saves, dice = count(200) // 2, random.Random(2)
    reads = failures = kills = stale = newest = 0
    while (newest < saves or not stale) and kills < 1000:  # a few kills may all miss a save
        process = server.start(tmp_path, KILL_AT=json.dumps({"place": place}))
        end = time.monotonic() + dice.uniform(0.02, 0.2)
        while time.monotonic() < end:
            if newest or (tmp_path / "last.pt").exists():
                reads += 1
                try:
                    number = read_step(tmp_path / "last.pt")
                    failures += number < newest  # a step back
                    newest = number
                    if number > 2:
                        failures += not number - 3 <= read_step(tmp_path / "previous.pt")
                except FlowtrainError:
                    failures += 1
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.err
        kills += 1
        stale += any(tmp_path.glob(".*.tmp"))
    promise(
        2,
        f"readings without a whole checkpoint during {newest} saves and {kills} kills ({place}), of {reads}",
        str(failures),
    )
    assert not failures and reads > saves and stale


def test_the_temporary_files_of_a_killed_run_are_removed(server, environment, tmp_path):
    kill = {"place": "before rename", "save": 2}
    assert server.run(tmp_path, **environment(1), KILL_AT=json.dumps(kill)) == -signal.SIGKILL
    (run,) = runs_in(tmp_path)
    assert sorted(file.name.split(".")[1] for file in run.rglob(".*.tmp")) == ["last", "previous"]
    assert server.run(tmp_path, **environment(1)) == 0
    assert not list(run.rglob(".*.tmp"))
