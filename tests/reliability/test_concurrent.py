"""Runs and jobs beside each other: none writes into another's records, none ends another."""

import csv
import json
import platform
import signal
import socket

from forks import runs_in, steps

WORDS = [
    "train",
    "model=realnvp_vector",
    "model.hidden=8",
    "model.pairs=1",
    "dataset=moons",
    "dataset.rows=500",
    "batch_size=16",
    "trainer.tensorboard=false",
    "trainer.log_every=1",
    "trainer.val_every=1000",
]

FAULTS = """
import os, signal, time

class Schedule:
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, progress, step):
        if step == 3:
            if self.kind == "error":
                raise KeyError("a bug")
            if self.kind == "exit":
                os._exit(7)
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while self.kind == "hanging":
                time.sleep(1)
        if self.kind == "slow":
            time.sleep(2)
        return 1.0
"""


def test_ten_runs_in_one_second(server, tmp_path, promise):
    several = [server.start(tmp_path, *WORDS, "max_steps=2", SLOW="one second") for _ in range(10)]
    codes = [one.wait() for one in several]
    runs = runs_in(tmp_path)
    ended = [run for run in runs if (run / "summary.json").exists()]
    whole = [run for run in ended if [row["step"] for row in steps(run)] == [1, 2, 2]]
    promise(13, "directories of ten runs started in one second", f"{len(whole)} of 10")
    assert codes == [0] * 10 and len(whole) == len(runs) == 10
    assert {run.name.removeprefix("2026-01-01_00-00-00") for run in runs} == {"", *(f"_{n}" for n in range(2, 11))}


def test_two_processes_that_resume_one_run(server, tmp_path, count, promise):
    assert server.run(tmp_path, *WORDS, "max_steps=2") == 0
    (run,) = runs_in(tmp_path)
    rounds, refused = count(10), 0
    for number in range(rounds):
        how = ["train", f"resume={run}", "max_steps=1000000"] if number % 2 else [*WORDS, "resume=true"]
        both = [server.start(tmp_path, *how, "max_steps=1000000") for _ in range(2)]
        both[0].until(lambda: any(not one.alive() for one in both))
        loser, winner = sorted(both, key=lambda one: one.alive())
        status = json.loads((run / "status.json").read_text())
        said = f"flowtrain: {run}: is being trained by process {winner.pid} on {platform.node()}\n"
        refused += (
            winner.alive()
            and loser.wait() == 2
            and loser.err == said
            and (status["state"], status["pid"], status["host"]) == ("running", winner.pid, socket.gethostname())
        )
        winner.kill(signal.SIGKILL)
        winner.wait()
    promise(13, "the second of two processes that resume one run refused, naming the first", f"{refused} of {rounds}")
    assert refused == rounds
    assert server.run(tmp_path, *WORDS, "resume=true", "max_steps=30") == 0  # what they left is whole
    assert [row["step"] for row in steps(run)] == sorted(row["step"] for row in steps(run))


ENDINGS = {  # of a job -> what its row says
    "good": "",
    "error": "KeyError: 'a bug'",
    "exit": "a worker ended with code 7",
    "killed": "a worker was killed by SIGKILL",
    "stopped": "job_timeout=12: still ran after 12 seconds, and was ended",
    "hanging": "job_timeout=12: still ran after 12 seconds, and was ended",
    "slow": "job_timeout=12: still ran after 12 seconds, and was ended",
    "fine": "",
}


def test_a_sweep_finishes_what_it_can(server, tmp_path, count, promise):
    kinds = [*ENDINGS] if count(10) == 10 else ["killed", "stopped", "fine"]
    (tmp_path / "faults.py").write_text(FAULTS)
    sweep = server.start(
        tmp_path,
        *WORDS,
        "--multirun",
        "allow=[faults]",
        "scheduler=constant",
        "scheduler._target_=faults.Schedule",
        f"+scheduler.kind={','.join(kinds)}",
        "max_steps=20",
        "job_timeout=12",
    )
    code = sweep.wait(300)
    (table,) = tmp_path.glob("outputs/sweeps/*/results.csv")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    right = 0
    for kind, row in zip(kinds, rows, strict=True):
        wanted = "failed" if ENDINGS[kind] else "finished"
        with open(f"{row['run_dir']}/status.json") as file:
            status = json.load(file)
        right += (
            f"kind={kind}" in row["overrides"]
            and row["status"] == status["state"] == wanted
            and row["error"].startswith(ENDINGS[kind])
            and bool(row["error"]) == (wanted == "failed")
        )
    named = sum(f"flowtrain: job {number}: {row['error']}" in sweep.err for number, row in enumerate(rows))
    promise(13, "jobs of a sweep that ended well, crashed, hung or were killed: told so", f"{right} of {len(kinds)}")
    assert right == len(kinds) and code == 1 and named == sum(kind not in ("good", "fine") for kind in kinds), rows
