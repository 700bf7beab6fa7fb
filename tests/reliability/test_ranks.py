"""What becomes of a run on two processes when one of them dies or stops, and when their number changes."""

import json
import os
import random
import signal
import time

import pytest
from forks import runs_in, same, state, steps

WORDS = [
    "train",
    "model=realnvp_vector",
    "model.hidden=8",
    "model.pairs=1",
    "dataset=moons",
    "dataset.rows=500",
    "batch_size=16",
    "max_steps=24",
    "trainer.tensorboard=false",
    "trainer.log_every=1",
    "trainer.val_every=7",
    "trainer.sample_every=7",
    "trainer.save_every=5",
]
NOISY = [  # order, dequantization, dropout, the moments of batches: all of the global batch
    "train",
    "model=realnvp_vector",
    "model.hidden=16",
    "model.pairs=1",
    "model.dropout=0.1",
    "dataset=digits",
    "batch_size=32",
    "scheduler=constant",
    "trainer.tensorboard=false",
    "trainer.log_every=1",
    "trainer.val_every=1000",
    "trainer.sample_every=null",
]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    assert server.run(cwd, *WORDS, "devices=2") == 0
    return runs_in(cwd)[0]


def reached(cwd, step) -> bool:
    return any(row["step"] >= step for run in runs_in(cwd) if (run / "metrics.jsonl").exists() for row in steps(run))


def at(process, step, rank, signum) -> float:
    """Send a rank a signal once the run has made that step; when."""
    process.until(lambda: reached(process.cwd, step))
    os.kill(process.rank(rank), signum)
    return time.monotonic()


def as_if_nothing_had_been(cwd, whole) -> bool:
    (run,) = runs_in(cwd)
    return steps(run) == steps(whole) and same(state(run), state(whole))


def test_one_of_two_processes_is_killed(server, whole, tmp_path, count, promise):
    draw = random.Random(5)
    cases = [(rank, draw.randrange(6, 22)) for rank in (0, 1) for _ in range(5)]
    cases = draw.sample(cases, count(len(cases)))
    problems, longest = {}, 0.0
    for number, (rank, step) in enumerate(cases):
        process = server.start(tmp_path / str(number), *WORDS, "devices=2", SLOW="every step")
        begun = at(process, step, rank, signal.SIGKILL)
        code = process.wait()
        seconds = time.monotonic() - begun
        longest = max(longest, seconds)
        status = json.loads((runs_in(process.cwd)[0] / "status.json").read_text())
        said = f"flowtrain: a worker was killed by SIGKILL: out of memory? (process {rank} of 2)\n"
        again = server.run(process.cwd, *WORDS, "devices=2", "resume=true")
        if (
            code != 1
            or seconds > 30
            or said not in process.err
            or status["state"] != "failed"
            or not status["resumable"]
            or again
            or not as_if_nothing_had_been(process.cwd, whole)
        ):
            problems[cases[number]] = code, seconds, process.err, status, again
    promise(
        5,
        "rank 0 or 1 killed: the other ended with 1 within 30 s, the run resumed to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}, at most {longest:.1f} s",
    )
    assert not problems


def test_a_launcher_with_restarts(server, whole, tmp_path, count, promise):
    cases = [((0, 8), (1, 16)), ((1, 8), (0, 16)), ((1, 7), (1, 13)), ((0, 12),)]
    cases = random.Random(6).sample(cases, count(len(cases)))
    problems = {}
    for number, kills in enumerate(cases):
        process = server.start(
            tmp_path / str(number), *WORDS, "resume=true", kind="torchrun", RESTARTS="2", SLOW="every step"
        )
        for rank, step in kills:
            at(process, step, rank, signal.SIGKILL)
        code = process.wait()
        if code or not as_if_nothing_had_been(process.cwd, whole):
            problems[kills] = code, process.err
    promise(
        5,
        "ranks killed under max_restarts=2: the run ended as if nothing had been, to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def test_one_of_two_processes_is_stopped(server, tmp_path, count, promise):
    cases = [(rank, step) for rank in (0, 1) for step in (6, 12)]
    cases = random.Random(7).sample(cases, count(len(cases)))
    problems, longest = {}, 0.0
    for number, (rank, step) in enumerate(cases):
        words = [*WORDS, "devices=2", "dist.timeout_s=10"]
        process = server.start(tmp_path / str(number), *words, SLOW="every step")
        begun = at(process, step, rank, signal.SIGSTOP)
        code = process.wait()
        seconds = time.monotonic() - begun
        longest = max(longest, seconds)
        status = json.loads((runs_in(process.cwd)[0] / "status.json").read_text())
        said = f"flowtrain: a worker no longer answered (process {rank} of 2)\n"
        if code != 1 or seconds > 10 + 15 or said not in process.err or not status["resumable"]:
            problems[cases[number]] = code, seconds, process.err, status
    promise(
        5,
        "rank 0 or 1 stopped: the job ended by dist.timeout_s=10 and the 10 s that it gives the others",
        f"{len(cases) - len(problems)} of {len(cases)}, at most {longest:.1f} s",
    )
    assert not problems


def test_the_number_of_processes_changes(server, tmp_path, count, promise):
    assert server.run(tmp_path / "whole", *NOISY, "devices=1", "max_steps=100") == 0
    expected = losses(tmp_path / "whole")
    worst = 0.0
    for first, then in [(1, 2), (2, 1)][: count(2)]:
        cwd = tmp_path / f"{first}{then}"
        assert server.run(cwd, *NOISY, f"devices={first}", "max_steps=30") == 0
        assert server.run(cwd, *NOISY, f"devices={then}", "max_steps=100", "resume=true") == 0
        found = losses(cwd)
        assert found.keys() == expected.keys() == {*range(1, 101)}
        worst = max(worst, *(abs(found[step] / expected[step] - 1) for step in expected))
    promise(5, "the losses of 100 steps, from 1 to 2 processes and back: to 1e-4", f"{worst:.1e}")
    assert worst < 1e-4


def losses(cwd) -> dict[int, float]:
    (run,) = runs_in(cwd)
    return {row["step"]: row["train/bits_per_dim"] for row in steps(run) if "train/bits_per_dim" in row}
