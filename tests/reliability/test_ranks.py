"""Promise 5: a run on two processes when one of them dies or stops, and when their number changes."""

import json
import os
import random
import signal
import time

import pytest
from forks import SMALL_RUN, are_equal, read_metrics, read_state, runs_in

WORDS = [
    *SMALL_RUN,
    "max_steps=24",
    "logger=none",
    "trainer.log_every=1",
    "trainer.val_every=7",
    "trainer.sample_every=7",
    "trainer.save_every=5",
]
NOISY = [  # data order, dequantization, dropout and batch moments belong to the global batch
    "train",
    "model=realnvp_vector",
    "model.hidden=16",
    "model.pairs=1",
    "model.dropout=0.1",
    "dataset=digits",
    "batch_size=32",
    "scheduler=constant",
    "logger=none",
    "trainer.log_every=1",
    "trainer.val_every=1000",
    "trainer.sample_every=null",
]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run on two processes without a fault."""
    cwd = tmp_path_factory.mktemp("whole")
    assert server.run(cwd, *WORDS, "devices=2") == 0
    return runs_in(cwd)[0]


def has_reached(cwd, step) -> bool:
    """Whether a run in ``cwd`` has made a step."""
    return any(
        row["step"] >= step for run in runs_in(cwd) if (run / "metrics.jsonl").exists() for row in read_metrics(run)
    )


def send_signal(process, step, rank, signum) -> float:
    """Send a signal to a rank after a step of the run, and return the time."""
    process.wait_until(lambda: has_reached(process.cwd, step))
    os.kill(process.rank(rank), signum)
    return time.monotonic()


def equals_whole(cwd, whole) -> bool:
    """Whether the run in ``cwd`` has the metrics and the state of ``whole``."""
    (run,) = runs_in(cwd)
    return read_metrics(run) == read_metrics(whole) and are_equal(read_state(run), read_state(whole))


def test_a_run_ends_and_resumes_when_a_rank_is_killed(server, whole, tmp_path, count, promise):
    draw = random.Random(5)
    cases = [(rank, draw.randrange(6, 22)) for rank in (0, 1) for _ in range(5)]
    cases = draw.sample(cases, count(len(cases)))
    problems, longest = {}, 0.0
    for number, (rank, step) in enumerate(cases):
        process = server.start(tmp_path / str(number), *WORDS, "devices=2", SLOW="every step")
        start = send_signal(process, step, rank, signal.SIGKILL)
        code = process.wait()
        seconds = time.monotonic() - start
        longest = max(longest, seconds)
        status = json.loads((runs_in(process.cwd)[0] / "status.json").read_text())
        message = f"flowtrain: a worker was killed by SIGKILL: out of memory? (process {rank} of 2)\n"
        again = server.run(process.cwd, *WORDS, "devices=2", "resume=true")
        if (
            code != 1
            or seconds > 30
            or message not in process.err
            or status["state"] != "failed"
            or not status["resumable"]
            or again
            or not equals_whole(process.cwd, whole)
        ):
            problems[cases[number]] = code, seconds, process.err, status, again
    promise(
        5,
        "rank 0 or 1 killed: the other ended with 1 within 30 s, the run resumed to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}, at most {longest:.1f} s",
    )
    assert not problems


def test_torchrun_restarts_a_run_bit_for_bit(server, whole, tmp_path, count, promise):
    cases = [((0, 8), (1, 16)), ((1, 8), (0, 16)), ((1, 7), (1, 13)), ((0, 12),)]
    cases = random.Random(6).sample(cases, count(len(cases)))
    problems = {}
    for number, kills in enumerate(cases):
        process = server.start(
            tmp_path / str(number), *WORDS, "resume=true", kind="torchrun", RESTARTS="2", SLOW="every step"
        )
        for rank, step in kills:
            send_signal(process, step, rank, signal.SIGKILL)
        code = process.wait()
        if code or not equals_whole(process.cwd, whole):
            problems[kills] = code, process.err
    promise(
        5,
        "ranks killed under max_restarts=2: the run ended as if nothing had been, to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def test_a_run_ends_when_a_rank_stops_answering(server, tmp_path, count, promise):
    cases = [(rank, step) for rank in (0, 1) for step in (6, 12)]
    cases = random.Random(7).sample(cases, count(len(cases)))
    problems, longest = {}, 0.0
    for number, (rank, step) in enumerate(cases):
        words = [*WORDS, "devices=2", "dist.timeout_s=10"]
        process = server.start(tmp_path / str(number), *words, SLOW="every step")
        start = send_signal(process, step, rank, signal.SIGSTOP)
        code = process.wait()
        seconds = time.monotonic() - start
        longest = max(longest, seconds)
        status = json.loads((runs_in(process.cwd)[0] / "status.json").read_text())
        message = f"flowtrain: a worker no longer answered (process {rank} of 2)\n"
        if code != 1 or seconds > 10 + 15 or message not in process.err or not status["resumable"]:
            problems[cases[number]] = code, seconds, process.err, status
    promise(
        5,
        "rank 0 or 1 stopped: the job ended by dist.timeout_s=10 and the 10 s that it gives the others",
        f"{len(cases) - len(problems)} of {len(cases)}, at most {longest:.1f} s",
    )
    assert not problems


def test_losses_do_not_depend_on_the_number_of_processes(server, tmp_path, count, promise):
    assert server.run(tmp_path / "whole", *NOISY, "devices=1", "max_steps=100") == 0
    expected = read_losses(tmp_path / "whole")
    worst = 0.0
    for first, then in [(1, 2), (2, 1)][: count(2)]:
        cwd = tmp_path / f"{first}{then}"
        assert server.run(cwd, *NOISY, f"devices={first}", "max_steps=30") == 0
        assert server.run(cwd, *NOISY, f"devices={then}", "max_steps=100", "resume=true") == 0
        found = read_losses(cwd)
        assert found.keys() == expected.keys() == {*range(1, 101)}
        worst = max(worst, *(abs(found[step] / expected[step] - 1) for step in expected))
    promise(5, "the losses of 100 steps, from 1 to 2 processes and back: to 1e-4", f"{worst:.1e}")
    assert worst < 1e-4


def read_losses(cwd) -> dict[int, float]:
    (run,) = runs_in(cwd)
    return {row["step"]: row["train/bits_per_dim"] for row in read_metrics(run) if "train/bits_per_dim" in row}
