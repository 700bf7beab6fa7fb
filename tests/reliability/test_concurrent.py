"""Promise 13: runs and jobs at the same time do not write into each other's records or end each other."""

import csv
import json
import platform
import signal
import socket

from forks import SMALL_RUN, read_metrics, runs_in

WORDS = [
    *SMALL_RUN,
    "logger=none",
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


def test_ten_runs_in_one_second_have_ten_directories(server, tmp_path, promise):
    processes = [server.start(tmp_path, *WORDS, "max_steps=2", SLOW="one second") for _ in range(10)]
    codes = [one.wait() for one in processes]
    runs = runs_in(tmp_path)
    ended = [run for run in runs if (run / "summary.json").exists()]
    whole = [run for run in ended if [row["step"] for row in read_metrics(run)] == [1, 2, 2]]
    promise(13, "directories of ten runs started in one second", f"{len(whole)} of 10")
    assert codes == [0] * 10 and len(whole) == len(runs) == 10
    assert {run.name.removeprefix("2026-01-01_00-00-00") for run in runs} == {"", *(f"_{n}" for n in range(2, 11))}


def test_a_second_process_cannot_resume_the_same_run(server, tmp_path, count, promise):
    assert server.run(tmp_path, *WORDS, "max_steps=2") == 0
    (run,) = runs_in(tmp_path)
    rounds, right = count(10), 0
    for number in range(rounds):
        words = ["train", f"resume={run}", "max_steps=1000000"] if number % 2 else [*WORDS, "resume=true"]
        both = [server.start(tmp_path, *words, "max_steps=1000000") for _ in range(2)]
        both[0].wait_until(lambda: any(not one.is_alive() for one in both))
        loser, winner = sorted(both, key=lambda one: one.is_alive())
        status = json.loads((run / "status.json").read_text())
        message = f"flowtrain: {run}: is being trained by process {winner.pid} on {platform.node()}\n"
        right += (
            winner.is_alive()
            and loser.wait() == 2
            and loser.err == message
            and (status["state"], status["pid"], status["host"]) == ("running", winner.pid, socket.gethostname())
        )
        winner.kill(signal.SIGKILL)
        winner.wait()
    promise(13, "the second of two processes that resume one run refused, naming the first", f"{right} of {rounds}")
    assert right == rounds
    assert server.run(tmp_path, *WORDS, "resume=true", "max_steps=30") == 0  # its checkpoint is intact
    assert [row["step"] for row in read_metrics(run)] == sorted(row["step"] for row in read_metrics(run))


ERRORS = {  # kind of job -> the error in its row
    "good": "",
    "error": "KeyError: 'a bug'",
    "exit": "a worker ended with code 7",
    "killed": "a worker was killed by SIGKILL",
    "stopped": "job_timeout=12: still ran after 12 seconds, and was ended",
    "hanging": "job_timeout=12: still ran after 12 seconds, and was ended",
    "slow": "job_timeout=12: still ran after 12 seconds, and was ended",
    "fine": "",
}


def test_a_sweep_finishes_its_other_jobs_when_some_fail(server, tmp_path, count, promise):
    kinds = [*ERRORS] if count(10) == 10 else ["killed", "stopped", "fine"]
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
        expected = "failed" if ERRORS[kind] else "finished"
        with open(f"{row['run_dir']}/status.json") as file:
            status = json.load(file)
        right += (
            f"kind={kind}" in row["overrides"]
            and row["status"] == status["state"] == expected
            and row["error"].startswith(ERRORS[kind])
            and bool(row["error"]) == (expected == "failed")
        )
    named = sum(f"flowtrain: job {number}: {row['error']}" in sweep.err for number, row in enumerate(rows))
    promise(13, "jobs of a sweep that ended well, crashed, hung or were killed: told so", f"{right} of {len(kinds)}")
    assert right == len(kinds) and code == 1 and named == sum(kind not in ("good", "fine") for kind in kinds), rows
