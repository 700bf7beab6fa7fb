"""A group of worker processes for one job, and what a worker does.

The parent composed the configuration; each worker gets the job through its stdin, which stays open while the parent
lives. Workers are sessions of their own, so that a signal, whether sent to the parent or typed at a terminal, reaches
them once: from the parent, which waits until they have saved.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from flowtrain.errors import FlowtrainError, Interrupted
from flowtrain.runtime import distributed
from flowtrain.runtime.signals import SAME, SIGNALS

GRACE = 10  # seconds that the others have to end by themselves once a worker has failed,
ENDING = 20  # that a job has which took too long,
SAVING = 600  # that the first has, which may be writing, once another has ended by a signal


# the code of a worker that had no time to say why -> the signal: its first while it started, its second later
ENDED_BY = {-signum: signum for signum in SIGNALS} | {Interrupted(signum).exit_code: signum for signum in SIGNALS[:2]}


class Failed(FlowtrainError):
    """A worker's error, with its exit code."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def launch(job: dict, count: int, timeout: float | None) -> dict:
    """Run ``job`` (arguments of :func:`flowtrain.cli.worker.execute`) on ``count`` processes; rank 0's summary.

    Raises:
        Interrupted: this process was asked to end, and so it asked them.
        Failed: what one of them ended by, or that they took more than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="flowtrain-") as folder:
        payload = pickle.dumps({**job, "folder": folder})
        received: list[tuple[int, float]] = []
        group: list[subprocess.Popen] = []

        def forward(signum, frame):
            received.append((signum, time.monotonic()))
            again = received[-1][1] - received[0][1] > SAME
            _tell(group, signal.SIGKILL if again else signal.SIGTERM)

        main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, forward) for number in SIGNALS} if main_thread else {}
        try:
            for rank in range(count):
                worker = subprocess.Popen(
                    [sys.executable, "-m", "flowtrain.cli.worker"],
                    stdin=subprocess.PIPE,
                    env=_environment(rank, count, folder),
                    start_new_session=True,
                )
                group.append(worker)
                with suppress(BrokenPipeError):  # it has died already
                    worker.stdin.write(payload)
                    worker.stdin.flush()
                if received:  # perhaps before this one was known
                    _tell(group, signal.SIGTERM)
                    break
            late, first = _wait(group, timeout)
        finally:
            silent = [worker for worker in group if worker.poll() is None]
            _tell(silent, signal.SIGKILL)
            for worker in group:
                worker.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if received:
            raise Interrupted(received[0][0])
        if late:
            raise Failed(f"job_timeout={timeout:g}: still ran after {timeout:g} seconds, and was ended", 1)
        return _outcome(group, first, silent, Path(folder))


def _tell(group, signum: int) -> None:
    """Workers get SIGTERM for every request: to SIGINT, Python answers with a traceback while it starts."""
    for worker in group:
        if worker.poll() is None:
            worker.send_signal(signum)


def _environment(rank: int, count: int, folder: str) -> dict:
    env = dict(os.environ)
    env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    env.update(FLOWTRAIN_STORE=f"{folder}/store")
    env.setdefault("OMP_NUM_THREADS", str(max(1, distributed.cores() // count)))
    here = str(Path(__file__).resolve().parents[2])  # a checkout that is not installed
    env["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [env.get("PYTHONPATH")])])
    return env


def _wait(group, timeout: float | None) -> tuple[bool, int | None]:
    """Until every worker has ended, or those that are left have had their time since one failed or since ``timeout``
    passed; whether that has, and which failed first. A signal that ended one of them before it could tell the others
    is meant for all."""
    begun, late, since, patience, first = time.monotonic(), False, None, GRACE, None
    while None in (codes := [worker.poll() for worker in group]):
        now = time.monotonic()
        failed = {code for code in codes if code}
        if timeout and not late and not failed and now - begun > timeout:
            late, since, patience = True, now, ENDING
            _tell(group, signal.SIGTERM)
        elif failed and not since:
            since, first = now, next(rank for rank, code in enumerate(codes) if code)
            if any(-code in SIGNALS for code in failed):
                _tell(group, signal.SIGTERM)
        saving = failed and failed <= {130, 143} and group[0].poll() is None
        if since and now - since > (SAVING if saving else patience):
            break
        time.sleep(0.05)
    return late, first


def _outcome(group, first: int | None, silent, folder: Path) -> dict:
    """Rank 0's summary, or the error that explains the others': flowtrain's own, then a death, then the first of the
    others, then that one was ``silent``, which had to be killed; last, that one has lost another."""
    if not any(worker.returncode for worker in group):
        return json.loads((folder / "0.json").read_text())
    errors = []
    for rank, worker in enumerate(group):
        file, place = folder / f"{rank}.json", f"(process {rank} of {len(group)})"
        if worker in silent:
            errors.append((3, rank, f"a worker no longer answered {place}", 1, None))
        elif worker.returncode and file.is_file():
            error = json.loads(file.read_text())
            order = {"ours": 0, "lost": 4}.get(error["kind"], 2)
            errors.append((order, file.stat().st_mtime, error["error"], error["exit_code"], error["signum"]))
        elif worker.returncode in ENDED_BY:
            interrupted = Interrupted(ENDED_BY[worker.returncode])
            errors.append((1, rank != first, f"{interrupted} {place}", interrupted.exit_code, interrupted.signum))
        elif worker.returncode:
            errors.append((1, rank != first, f"{_death(worker.returncode)} {place}", 1, None))
    *_, text, code, signum = min(errors, key=lambda error: error[:2])
    raise Failed(text, code) from (Interrupted(signum) if signum else None)


def _death(returncode: int) -> str:
    if returncode > 0:
        return f"a worker ended with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"a worker was killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
