"""A signal ends a run soon, wherever it is and whichever of its processes it reaches; the run can go on as if nothing
had been."""

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
from forks import runs_in, same, state, steps

from flowtrain.errors import Interrupted

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
    """Devices -> a run that nothing has interrupted."""
    made = {}

    def of(devices: int):
        if devices not in made:
            cwd = tmp_path_factory.mktemp(f"whole{devices}")
            assert server.run(cwd, *WORDS, f"devices={devices}") == 0
            (made[devices],) = runs_in(cwd)
        return made[devices]

    return of


def caught(server, cwd, place, devices, reached, signum):
    """Run until it is in ``place``, and send the signal to the ``reached``: the process, how it ended, how soon."""
    process = server.start(cwd, *WORDS, f"devices={devices}", SLOW=place)
    process.until((cwd / "here.0").exists)
    target = process.pid if reached == "launcher" else process.rank(reached)
    begun = time.monotonic()
    os.kill(target, signum)
    return process, process.wait(), time.monotonic() - begun


def wrong(process, code, seconds, signum) -> list[str]:
    """What is not as it should be once a run has been interrupted."""
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
        if status["step"] != (state(run)["step"] if last.exists() else 0):
            found.append(f"status of step {status['step']}")
    return found


def resumed_as(whole, server, cwd, devices) -> bool:
    assert server.run(cwd, *WORDS, f"devices={devices}", "resume=true") == 0
    run = runs_in(cwd)[-1]
    status = json.loads((run / "status.json").read_text())
    return status["state"] == "finished" and steps(run) == steps(whole) and same(state(run), state(whole))


def judged(cases, server, whole, tmp_path):
    """Interrupt and resume each case (place, devices, reached, signum): what was wrong with which."""
    problems = {}
    for number, (place, devices, reached, signum) in enumerate(cases):
        cwd = tmp_path / str(number)
        process, code, seconds = caught(server, cwd, place, devices, reached, signum)
        found = wrong(process, code, seconds, signum)
        if not found and not resumed_as(whole(devices), server, cwd, devices):
            found = ["resumed otherwise"]
        if found:
            problems[place, devices, reached, signum.name] = [*found, process.err[-500:]]
    return problems


def test_one_process(server, whole, tmp_path, count, promise):
    draw = random.Random(1)
    cases = [(place, 1, "launcher", draw.choice(SIGNALS)) for place in (*STARTING, *TRAINING)]
    cases += [(place, 1, "launcher", signum) for place in ("step", "saving") for signum in SIGNALS]
    cases = draw.sample(cases, count(len(cases)))
    problems = judged(cases, server, whole, tmp_path)
    promise(
        4,
        "signals to one process, starting, waiting for data, training, validating, drawing or saving: ended within "
        "5 s with its code, said to be resumable, resumed to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def test_two_processes(server, whole, tmp_path, count, promise):
    draw = random.Random(2)
    places = [(place, ["launcher"]) for place in ("job", "import", "image", "end")]
    places += [(place, ["launcher", 0, 1]) for place in ("start", "step", "validation", "saving")]
    cases = [(place, 2, reached, draw.choice(SIGNALS)) for place, several in places for reached in several]
    cases = draw.sample(cases, count(len(cases)))
    problems = judged(cases, server, whole, tmp_path)
    promise(
        4,
        "signals to the launcher of two processes, or to one of them: the same",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def ended(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_second_signal_ends_at_once(server, tmp_path, count, promise):
    """Also where the main thread waits in C++, for a process that has been stopped."""
    cases = [(1, "launcher", "stuck"), (2, "launcher", "stuck"), (2, 0, "stopped")]
    cases = random.Random(3).sample(cases, count(len(cases)))
    problems = {}
    for number, (devices, reached, place) in enumerate(cases):
        cwd = tmp_path / str(number)
        process = server.start(cwd, *WORDS, f"devices={devices}", SLOW="step" if place == "stopped" else place)
        process.until((cwd / "here.0").exists)
        target = process.pid if reached == "launcher" else process.rank(reached)
        if place == "stopped":
            os.kill(process.rank(1), signal.SIGSTOP)
            time.sleep(1)
        os.kill(target, signal.SIGTERM)
        time.sleep(1.5)
        still = process.alive()
        begun = time.monotonic()
        os.kill(target, signal.SIGTERM)
        while not ended(target) and time.monotonic() < begun + SOON:
            time.sleep(0.01)
        seconds = time.monotonic() - begun
        code = process.wait()
        status = json.loads((runs_in(cwd)[0] / "status.json").read_text())
        if not still or seconds > 1 or code != 143 or not status["resumable"]:
            problems[cases[number]] = still, seconds, code, status, process.err
    promise(4, "a second signal ends at once", f"{len(cases) - len(problems)} of {len(cases)}")
    assert not problems


def saved_soon(process, signum) -> str:
    """What is wrong with how a run under torchrun, which makes 1 of every code, was left."""
    (run,) = runs_in(process.cwd)
    end = time.monotonic() + SOON
    while (status := json.loads((run / "status.json").read_text()))["state"] == "running" and time.monotonic() < end:
        time.sleep(0.02)
    right = {"state": "interrupted", "resumable": True, "signal": signum.name}
    return "" if right.items() <= status.items() and status["step"] == state(run)["step"] >= 13 else str(status)


def test_torchrun(server, whole, tmp_path, count, promise):
    """To torchrun, which passes SIGTERM and SIGINT on and dies of SIGUSR1, and to one process."""
    cases = [("launcher", signum) for signum in SIGNALS] + [(0, signal.SIGTERM), (1, signal.SIGINT)]
    cases = random.Random(4).sample(cases, count(len(cases)))
    problems = {}
    for number, (reached, signum) in enumerate(cases):
        cwd = tmp_path / str(number)
        process = server.start(cwd, *WORDS, kind="torchrun", SLOW="step", RESTARTS="0")
        process.until((cwd / "here.0").exists)
        os.kill(process.pid if reached == "launcher" else process.rank(reached), signum)
        found = saved_soon(process, signal.SIGTERM if (reached, signum) == ("launcher", signal.SIGUSR1) else signum)
        if process.wait() == 0 or found or not resumed_as(whole(2), server, cwd, 2):
            problems[cases[number]] = found, process.err
    promise(
        4,
        "signals to torchrun or to one of its two processes: saved within 5 s, resumed to the bit",
        f"{len(cases) - len(problems)} of {len(cases)}",
    )
    assert not problems


def test_torchrun_itself(server, whole, tmp_path, count, promise):
    """The same once without forking."""
    if count(2) == 1:
        pytest.skip("takes as long as all others; with --reliability")
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
    left = saved_soon(SimpleNamespace(cwd=tmp_path), signal.SIGTERM)
    right = not left and process.returncode == 1 and resumed_as(whole(2), server, tmp_path, 2)
    promise(4, "the same, SIGTERM to torchrun itself, without forking", f"{int(right)} of 1")
    assert right, (left, process.returncode)
