"""Promise 4: a signal to any process of a run, at any point, ends it soon, and the run can be resumed bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import SMALL_RUN, are_equal, read_metrics, read_state, runs_in

from flowtrain.errors import Interrupted

WORDS = [
    *SMALL_RUN,
    "max_steps=24",
    "logger=none",
    "trainer.log_every=2",
    "trainer.val_every=7",
    "trainer.sample_every=7",
    "trainer.save_every=5",
]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STARTING = ("check", "job", "import", "open", "start")
TRAINING = ("data", "step", "moments", "validation", "image", "saving", "end")
SOON = 5  # seconds


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """``whole(devices)``: a run without an interruption."""
    runs = {}

    def train(devices: int):
        if devices not in runs:
            cwd = tmp_path_factory.mktemp(f"whole{devices}")
            assert server.run(cwd, *WORDS, f"devices={devices}") == 0
            (runs[devices],) = runs_in(cwd)
        return runs[devices]

    return train


def interrupt(server, cwd, place, devices, target, signum):
    """Run until ``place`` and send a signal to the launcher or a rank: the process, its exit code, and its seconds."""
    process = server.start(cwd, *WORDS, f"devices={devices}", SLOW=place)
    process.wait_until((cwd / "here.0").exists)
    pid = process.pid if target == "launcher" else process.rank(target)
    start = time.monotonic()
    os.kill(pid, signum)
    return process, process.wait(), time.monotonic() - start


def find_failures(process, code, seconds, signum) -> list[str]:
    """What is not as promised after an interruption."""
    found = []
    if code != Interrupted(signum).exit_code:
        found.append(f"exit code {code}")
    if seconds > SOON:
        found.append(f"took {seconds:.1f} s")
    if "Traceback" in process.err:
        found.append("a traceback")
    for run in runs_in(process.cwd):
        status = json.loads((run / "status.json").read_text())
        last = run / "checkpoints" / "last.pt"
        if status["state"] != "interrupted" or status["resumable"] is not True or status["signal"] != signum.name:
            found.append(f"status {status}")
        if status["step"] != (read_state(run)["step"] if last.exists() else 0):
            found.append(f"status of step {status['step']}")
    return found


def resumes_as(whole, server, cwd, devices) -> bool:
    """Resume a run, and return whether it ends like ``whole``."""
    assert server.run(cwd, *WORDS, f"devices={devices}", "resume=true") == 0
    run = runs_in(cwd)[-1]
    status = json.loads((run / "status.json").read_text())
    return (
        status["state"] == "finished"
        and read_metrics(run) == read_metrics(whole)
        and are_equal(read_state(run), read_state(whole))
    )


def interrupt_and_resume(cases, server, whole, tmp_path):
    """Interrupt and resume a run for each case (place, devices, target, signum): the failures of each case."""
    problems = {}
    for number, (place, devices, target, signum) in enumerate(cases):
        cwd = tmp_path / str(number)
        process, code, seconds = interrupt(server, cwd, place, devices, target, signum)
        found = find_failures(process, code, seconds, signum)
        if not found and not resumes_as(whole(devices), server, cwd, devices):
            found = ["resumed to another end"]
        if found:
            problems[place, devices, target, signum.name] = [*found, process.err[-500:]]
    return problems


def test_a_signal_to_one_process_ends_a_run_that_resumes_bit_for_bit(server, whole, tmp_path, count, promise):
    draw = random.Random(1)
    cases = [(place, 1, "launcher", draw.choice(SIGNALS)) for place in (*STARTING, *TRAINING)]
    cases += [(place, 1, "launcher", signum) for place in ("step", "saving") for signum in SIGNALS]
    cases = draw.sample(cases, count(len(cases)))
    problems = interrupt_and_resume(cases, server, whole, tmp_path)
    promise(
        4,
        "signals to one process, starting, waiting for data, training, validating, drawing or saving: ended within "
        "5 s with its code, said to be resumable, resumed to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def test_a_signal_to_one_of_two_processes_ends_a_run_that_resumes_bit_for_bit(server, whole, tmp_path, count, promise):
    draw = random.Random(2)
    places = [(place, ["launcher"]) for place in ("job", "import", "image", "end")]
    places += [(place, ["launcher", 0, 1]) for place in ("start", "step", "validation", "saving")]
    cases = [(place, 2, target, draw.choice(SIGNALS)) for place, targets in places for target in targets]
    cases = draw.sample(cases, count(len(cases)))
    problems = interrupt_and_resume(cases, server, whole, tmp_path)
    promise(
        4,
        "signals to the launcher of two processes, or to one of them: the same",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def has_ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_second_signal_ends_at_once(server, tmp_path, count, promise):
    """Also while the main thread waits in C++ for a stopped process."""
    cases = [(1, "launcher", "stuck"), (2, "launcher", "stuck"), (2, 0, "stopped")]
    cases = random.Random(3).sample(cases, count(len(cases)))
    problems = {}
    for number, (devices, target, place) in enumerate(cases):
        cwd = tmp_path / str(number)
        process = server.start(cwd, *WORDS, f"devices={devices}", SLOW="step" if place == "stopped" else place)
        process.wait_until((cwd / "here.0").exists)
        pid = process.pid if target == "launcher" else process.rank(target)
        if place == "stopped":
            os.kill(process.rank(1), signal.SIGSTOP)
            time.sleep(1)
        os.kill(pid, signal.SIGTERM)
        time.sleep(1.5)
        still_alive = process.is_alive()
        start = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        while not has_ended(pid) and time.monotonic() < start + SOON:
            time.sleep(0.01)
        seconds = time.monotonic() - start
        code = process.wait()
        status = json.loads((runs_in(cwd)[0] / "status.json").read_text())
        if not still_alive or seconds > 1 or code != 143 or not status["resumable"]:
            problems[cases[number]] = still_alive, seconds, code, status, process.err
    promise(4, "a second signal ends at once", f"{len(cases) - len(problems)} of {len(cases)}")
    assert not problems


def find_failure(process, signum) -> str:
    """What is not as promised after an interruption under torchrun, whose exit code is always 1."""
    (run,) = runs_in(process.cwd)
    end = time.monotonic() + SOON
    while (status := json.loads((run / "status.json").read_text()))["state"] == "running" and time.monotonic() < end:
        time.sleep(0.02)
    right = {"state": "interrupted", "resumable": True, "signal": signum.name}
    return "" if right.items() <= status.items() and status["step"] == read_state(run)["step"] >= 13 else str(status)


def test_a_signal_under_torchrun_ends_a_run_that_resumes_bit_for_bit(server, whole, tmp_path, count, promise):
    """torchrun passes SIGTERM and SIGINT on and dies of SIGUSR1."""
    cases = [("launcher", signum) for signum in SIGNALS] + [(0, signal.SIGTERM), (1, signal.SIGINT)]
    cases = random.Random(4).sample(cases, count(len(cases)))
    problems = {}
    for number, (target, signum) in enumerate(cases):
        cwd = tmp_path / str(number)
        process = server.start(cwd, *WORDS, kind="torchrun", SLOW="step", RESTARTS="0")
        process.wait_until((cwd / "here.0").exists)
        os.kill(process.pid if target == "launcher" else process.rank(target), signum)
        found = find_failure(process, signal.SIGTERM if (target, signum) == ("launcher", signal.SIGUSR1) else signum)
        if process.wait() == 0 or found or not resumes_as(whole(2), server, cwd, 2):
            problems[cases[number]] = found, process.err
    promise(
        4,
        "signals to torchrun or to one of its two processes: saved within 5 s, resumed to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def test_a_signal_to_a_real_torchrun_ends_a_run_that_resumes_bit_for_bit(server, whole, tmp_path, count, promise):
    """Without forking."""
    if count(2) == 1:
        pytest.skip("takes as long as all other tests; runs with --reliability")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(Path(__file__).with_name("slow.py")),
        *WORDS,
    ]
    path = os.pathsep.join(str(Path(__file__).parents[number]) for number in (0, 1, 2))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SLOW": "step"}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "here.0").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait()
    failure = find_failure(SimpleNamespace(cwd=tmp_path), signal.SIGTERM)
    right = not failure and process.returncode == 1 and resumes_as(whole(2), server, tmp_path, 2)
    promise(4, "the same, SIGTERM to torchrun itself, without forking", f"{int(right)} of 1")
    assert right, (failure, process.returncode)
