"""Starts commands quickly in processes that tests can kill.

A server imports PyTorch and flowtrain once and forks a process for each command, and for each worker of a command with
``devices=``. This file, run as a program, is the server: it reads questions as lines of JSON and answers with others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from flowtrain.cli import exit_codes, worker
from flowtrain.runtime import checkpoint

HERE = Path(__file__).resolve().parent
SMALL_RUN = [  # the first words of a run whose steps take milliseconds
    "train",
    "model=realnvp_vector",
    "model.hidden=8",
    "model.pairs=1",
    "dataset=moons",
    "dataset.rows=500",
    "batch_size=16",
]


class Server:
    """Starts processes. Call ``close`` at the end."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE), env.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )

    def ask(self, **question):
        """Send a question to the server and return its answer."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, cwd: Path, *words, kind="command", **env) -> Process:
        """Start ``flowtrain words`` in ``cwd``, with more variables of the environment."""
        cwd.mkdir(exist_ok=True)
        return Process(self, cwd, self.ask(do="start", cwd=str(cwd), words=words, kind=kind, env=env))

    def run(self, cwd: Path, *words, **env) -> int:
        """Run ``flowtrain words`` in ``cwd`` and return its exit code."""
        return self.start(cwd, *words, **env).wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Process:
    """A process of the server; ``out`` and ``err`` are what it has printed so far."""

    def __init__(self, server: Server, cwd: Path, pid: int):
        self.server, self.cwd, self.pid = server, cwd, pid

    def wait(self, timeout: float = 120) -> int | None:
        """Wait for the end: the exit code, negative for a signal, or None after ``timeout`` seconds."""
        return self.server.ask(do="wait", pid=self.pid, timeout=timeout)

    def kill(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def rank(self, rank: int) -> int:
        """Wait until a worker has started, and return its process id."""
        found = []

        def has_started():
            files = [self.cwd / f"rank.{pid}" for pid in self.children()]
            found.extend(int(path.suffix[1:]) for path in files if path.exists() and path.read_text() == str(rank))
            return found

        self.wait_until(has_started)
        return found[0]

    def wait_until(self, condition, timeout: float = 60) -> None:
        """Wait until ``condition()`` is true; fail if the process ends before."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end and self.is_alive(), self.err
            time.sleep(0.005)

    def is_alive(self) -> bool:
        return self.server.ask(do="wait", pid=self.pid, timeout=0) is None

    @property
    def out(self) -> str:
        return (self.cwd / f"out.{self.pid}").read_text()

    @property
    def err(self) -> str:
        return (self.cwd / f"err.{self.pid}").read_text()


def read_metrics(run: Path) -> list[dict]:
    """Read metrics.jsonl without its times and without a line that is being written."""
    *lines, _ = (run / "metrics.jsonl").read_text().split("\n")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("system/")} for line in lines]


def read_state(run: Path) -> dict:
    """Read last.pt without the time and the configuration, which names the run's directory."""
    found = checkpoint.read(run / "checkpoints" / "last.pt")
    return {key: value for key, value in found.items() if key not in ("seconds", "config")}


def are_equal(one, other) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one == other


def runs_in(cwd: Path) -> list[Path]:
    return sorted(path for path in cwd.glob("outputs/*/*") if path.is_dir())


# -- the server


class ForkedWorker:
    """A forked worker with the interface of Popen that flowtrain.cli.launcher uses."""

    ends: list = []  # this process's ends of the workers' pipes

    def __init__(self, _command, stdin, env, start_new_session):
        assert start_new_session and stdin == subprocess.PIPE
        read, write = os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            _run_and_exit(lambda: self.work(read, write, env))
        os.close(read)
        self.stdin = os.fdopen(write, "wb")
        self.ends.append(self.stdin)

    def work(self, read, write, env):
        os.setsid()
        os.close(write)
        for end in self.ends:
            end.close()
        os.dup2(read, 0)
        sys.stdin = os.fdopen(0, closefd=False)
        os.environ.update(env)
        Path(f"rank.{os.getpid()}").write_text(env["RANK"])
        worker.main()

    def poll(self):
        if self.returncode is None:
            with suppress(ChildProcessError):  # a signal handler may call this during waitpid
                pid, code = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(code)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)


def _run_and_exit(main) -> None:
    """Run ``main`` with the default signal handlers, and exit."""
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start(cwd: str, words: list[str], kind: str, env: dict) -> int:
    """Fork a process that runs a command, and return its process id."""
    if kind == "open":
        import open_file  # with the libraries that read files: once, for all processes
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["flowtrain", *words]
    from flowtrain.cli import main

    sys.path.insert(0, cwd)
    if "SLOW" in env:
        import slow

        slow.patch()
    import disks
    import kill_points

    kill_points.prepare(env)
    disks.prepare(env, words)
    _run_and_exit(open_file.main if kind == "open" else {"command": main.main, "torchrun": _torchrun}[kind])


def _wait(pid: int, timeout: float, codes={}):  # noqa: B006 (keeps the exit codes)
    """Wait for a process: its exit code, or None after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while pid not in codes:
        found, code = os.waitpid(pid, os.WNOHANG)
        if found:
            codes[pid] = os.waitstatus_to_exitcode(code)
        elif time.monotonic() >= end:
            return None
        else:
            time.sleep(0.005)
    return codes[pid]


def _torchrun() -> None:
    """Do what ``torchrun --standalone --nproc-per-node=2 --max-restarts=$RESTARTS -m flowtrain`` does, with forks."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=int(os.environ["RESTARTS"]),
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _run_rank)()


def _run_rank() -> None:
    from flowtrain.cli import main

    Path(f"rank.{os.getpid()}").write_text(os.environ["RANK"])
    exit_codes.leave = lambda code: os._exit(code) if code else None  # a rank returns if it succeeds
    with suppress(SystemExit):
        main.main()


def serve() -> None:
    """Answer questions until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from types import SimpleNamespace

    import disks  # noqa: F401
    import hydra.experimental.callback  # noqa: F401
    import inprocess

    # imported once, for all processes
    import kill_points  # noqa: F401
    import slow  # noqa: F401
    import torch._dynamo  # noqa: F401
    from PIL import Image

    from flowtrain import flows, train  # noqa: F401
    from flowtrain.cli import launcher, sweep, worker  # noqa: F401
    from flowtrain.commands import eval, sample  # noqa: F401
    from flowtrain.engine import schedules  # noqa: F401

    Image.init()

    launcher.subprocess = SimpleNamespace(Popen=ForkedWorker, PIPE=subprocess.PIPE)
    launcher.ENDING = 3  # seconds; a process that hangs in a test has nothing to save
    with open(os.devnull, "w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        inprocess.flowtrain(".", "train", "--cfg", "job")  # imports what composing needs
        sys.stdout = before
    for line in sys.stdin:
        question = json.loads(line)
        do = {"start": _start, "wait": _wait}[question.pop("do")]
        answers.write(json.dumps(do(**question)) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    serve()
