"""Promises 1 and 2: a run killed at any moment goes on bit for bit, and there is always a checkpoint that is whole."""

import json
import random
import signal
import time

import deaths
import pytest
import torch
from forks import runs_in, same, state, steps

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
    "trainer.tensorboard=false",
    "resume=true",
)
SAVES = 5  # of last.pt while that trains, and one more at its end


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run that nobody killed, and how many seconds its command takes, and its training alone."""
    folder = tmp_path_factory.mktemp("whole")
    assert server.run(folder / "first", *WORDS) == 0
    began = time.monotonic()
    assert server.run(folder / "second", *WORDS) == 0
    seconds = time.monotonic() - began
    (run,) = runs_in(folder / "second")
    assert made(run) and same(made(run), made(*runs_in(folder / "first")))
    return run, (seconds, json.loads((run / "summary.json").read_text())["seconds"])


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """``composed(number)``: the environment of a run; four in five are spared the composing of their command."""
    file = tmp_path_factory.mktemp("composed") / "values.json"
    file.write_text(json.dumps(to_dict(train_config(*WORDS[1:]))))
    return lambda number: {} if number % 5 == 0 else {"COMPOSED": str(file)}


def made(run):
    """What a kill may not change: lines without clocks, and the state with its weights, averages and moments."""
    figures = json.loads((run / "summary.json").read_text())
    return steps(run), state(run), [figures[key] for key in ("log_likelihood", "steps", "skipped_steps")]


def goes_on(server, cwd, whole, **env) -> bool:
    """Whether the same command brings a killed run to the same end."""
    assert server.run(cwd, *WORDS, **env) == 0
    (run,) = [run for run in runs_in(cwd) if (run / "summary.json").exists()]
    assert not list(run.rglob(".*.tmp"))
    return same(made(run), made(whole))


def test_killed_at_any_moment(server, whole, composed, tmp_path, count, promise):
    run, seconds = whole
    dice, cases, equal = random.Random(1), count(50), 0
    number = killed = resumed = 0
    while killed < cases:
        number += 1
        assert number < 4 * cases
        cwd = tmp_path / str(number)
        env = composed(number)
        process = server.start(cwd, *WORDS, **env)
        if env:  # a start takes longer than the training itself
            process.until(lambda: any(cwd.glob("outputs/*/*/metrics.jsonl")))
        time.sleep(dice.uniform(0, seconds[bool(env)]))
        process.kill(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
            resumed += any(cwd.glob("outputs/*/*/checkpoints/last.pt"))
            equal += goes_on(server, cwd, run, **env)
    promise(1, "kills at a random moment, then bit for bit as if there had been none", f"{equal} of {cases}")
    assert equal == cases and resumed


@pytest.mark.parametrize("place", deaths.PLACES)
def test_killed_in_a_save(server, whole, composed, tmp_path, count, promise, place):
    run, _ = whole
    size = (run / "checkpoints/last.pt").stat().st_size
    dice, cases, equal = random.Random(place), count(10), 0
    for number in range(cases):
        cwd = tmp_path / str(number)
        # an old last.pt is needed to be pruned
        death = {"place": place, "save": dice.randint(1 + (place == "pruning"), SAVES + 1)}
        death |= {"byte": dice.randrange(200, size - 2000), "part": (number + dice.randrange(4)) % 4}
        assert server.run(cwd, *WORDS, **composed(number), DEATH=json.dumps(death)) == -signal.SIGKILL
        equal += goes_on(server, cwd, run, **composed(number))
    promise(1, f"kills {place}, then bit for bit as if there had been none", f"{equal} of {cases}")
    assert equal == cases


def test_killed_after_the_last_validation(server, whole, composed, tmp_path):
    """The line of a validation that no last.pt knows of is not written twice."""
    death = {"place": "before rename", "save": SAVES + 1}
    assert server.run(tmp_path, **composed(1), DEATH=json.dumps(death)) == -signal.SIGKILL
    (run,) = runs_in(tmp_path)
    assert state(run)["step"] == 45 and "val/log_likelihood" in steps(run)[-1]
    assert goes_on(server, tmp_path, whole[0], **composed(1))


@pytest.mark.parametrize("part", [*deaths.OMITTED, None])
def test_each_part_of_the_state_is_needed(server, whole, composed, tmp_path, part):
    """Without any one of them the comparison above fails."""
    save = SAVES + 1 if part == "records" else 3
    death = {"place": "before rename", "save": save}
    assert server.run(tmp_path, **composed(1), DEATH=json.dumps(death)) == -signal.SIGKILL
    omitted = {"OMIT": part} if part else {}
    assert goes_on(server, tmp_path, whole[0], **composed(1), **omitted) is (part is None)


# ---- always one good checkpoint --------------------------------------------------------------------------------------


def read(file):
    """The number of a checkpoint, which is in all of its parts."""
    found = checkpoint.read(file)
    assert torch.equal(found["x"], torch.full((20_000,), found["step"]))
    return found["step"]


@pytest.mark.parametrize("place", ["any", "no links"])
def test_a_reader_always_finds_a_checkpoint(server, tmp_path, count, promise, place):
    saves, dice = count(200) // 2, random.Random(2)
    reads = failures = kills = stale = newest = 0
    while (newest < saves or not stale) and kills < 1000:  # few kills may all have missed a save
        process = server.start(tmp_path, DEATH=json.dumps({"place": place}))
        end = time.monotonic() + dice.uniform(0.02, 0.2)
        while time.monotonic() < end:
            if newest or (tmp_path / "last.pt").exists():
                reads += 1
                try:
                    number = read(tmp_path / "last.pt")
                    failures += number < newest  # a step back
                    newest = number
                    if number > 2:
                        failures += not number - 3 <= read(tmp_path / "previous.pt")
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


def test_what_a_kill_left_is_removed(server, composed, tmp_path):
    death = {"place": "before rename", "save": 2}
    assert server.run(tmp_path, **composed(1), DEATH=json.dumps(death)) == -signal.SIGKILL
    (run,) = runs_in(tmp_path)
    assert sorted(file.name.split(".")[1] for file in run.rglob(".*.tmp")) == ["last", "previous"]
    assert server.run(tmp_path, **composed(1)) == 0
    assert not list(run.rglob(".*.tmp"))
