"""A group of worker processes for one job.

The parent composes the configuration. Each worker reads the job from its stdin, which stays open while the parent
lives. Each worker has a session of its own, so a signal to the parent or from a terminal reaches it once: from the
parent, which waits until the workers have saved.
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

from flowtrain.cli.exit_codes import WorkerError
from flowtrain.errors import Interrupted
from flowtrain.runtime import distributed
from flowtrain.runtime.distributed import PEER_FAILED
from flowtrain.runtime.signals import SAME, SIGNALS

GRACE = 10  # seconds that the other workers have to end by themselves once one has failed
ENDING = 20  # seconds that a job has once job_timeout has passed
SAVING = 600  # seconds that rank 0, which may be writing, has once a signal has ended another worker

# exit code of a worker that a signal ended before it could write why -> the signal: as it starts, the signal itself
ENDED_BY = {-signum: signum for signum in SIGNALS} | {Interrupted(signum).exit_code: signum for signum in SIGNALS[:2]}


def launch(job: dict, count: int, timeout: float | None, jobs: int = 1) -> dict:
    """Run ``job`` (arguments of :func:`flowtrain.cli.worker.execute`) on ``count`` processes; rank 0's summary.

    ``jobs`` of a sweep run side by side and share the cores.

    Raises:
        Interrupted: this process got a signal, and has passed it on.
        WorkerError: a worker failed, or the job took more than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="flowtrain-") as folder:
        payload = pickle.dumps({**job, "folder": folder})
        received: list[tuple[int, float]] = []
        group: list[subprocess.Popen] = []

        def forward(signum, frame):
            received.append((signum, time.monotonic()))
            again = received[-1][1] - received[0][1] > SAME
            _send_signal(group, signal.SIGKILL if again else signal.SIGTERM)

        main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, forward) for number in SIGNALS} if main_thread else {}
        try:
            for rank in range(count):
                worker = subprocess.Popen(
                    [sys.executable, "-m", "flowtrain.cli.worker"],
                    stdin=subprocess.PIPE,
                    env=_environment(rank, count, folder, jobs),
                    start_new_session=True,
                )
                group.append(worker)
                with suppress(BrokenPipeError):  # it has ended already
                    worker.stdin.write(payload)
                    worker.stdin.flush()
                if received:  # perhaps before this worker was in the group
                    _send_signal(group, signal.SIGTERM)
                    break
            late, first = _wait(group, timeout)
        finally:
            unresponsive = [worker for worker in group if worker.poll() is None]
            _send_signal(unresponsive, signal.SIGKILL)
            for worker in group:
                worker.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if received:
            raise Interrupted(received[0][0])
        if late:
            raise WorkerError(f"job_timeout={timeout:g}: still ran after {timeout:g} seconds, and was ended", 1)
        return _collect_summary(group, first, unresponsive, Path(folder))


def _send_signal(group, signum: int) -> None:
    """Workers get SIGTERM for every signal: after SIGINT, Python prints a traceback while it starts."""
    for worker in group:
        if worker.poll() is None:
            worker.send_signal(signum)


def _environment(rank: int, count: int, folder: str, jobs: int) -> dict:
    env = dict(os.environ)
    env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    env.update(FLOWTRAIN_STORE=f"{folder}/store")
    env.setdefault("OMP_NUM_THREADS", str(distributed.share_of_cores(count * jobs)))
    here = str(Path(__file__).resolve().parents[2])  # a checkout that is not installed
    env["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [env.get("PYTHONPATH")])])
    return env


def _wait(group, timeout: float | None) -> tuple[bool, int | None]:
    """Wait until every worker has ended, or until the time is up that the others have after one has failed or after
    ``timeout``. Returns whether the job took too long, and the rank that failed first. A signal that ended one worker
    is passed on to all."""
    start, late, since, patience, first = time.monotonic(), False, None, GRACE, None
    while None in (codes := [worker.poll() for worker in group]):
        now = time.monotonic()
        failed = {code for code in codes if code}
        if timeout and not late and not failed and now - start > timeout:
            late, since, patience = True, now, ENDING
            _send_signal(group, signal.SIGTERM)
        elif failed and not since:
            since, first = now, next(rank for rank, code in enumerate(codes) if code)
            if any(-code in SIGNALS for code in failed):
                _send_signal(group, signal.SIGTERM)
        saving = failed and failed <= {130, 143} and group[0].poll() is None
        if since and now - since > (SAVING if saving else patience):
            break
        time.sleep(0.05)
    return late, first


def _collect_summary(group, first: int | None, unresponsive, folder: Path) -> dict:
    """Rank 0's summary. Raises WorkerError with the likeliest cause: an error of flowtrain's own, then a process that
    ended without an error, then the first of the other errors, then an ``unresponsive`` worker, which was killed, and
    last a peer failure: on a GPU also an abort, by which NCCL ends a process that has waited too long for another."""
    if not any(worker.returncode for worker in group):
        return json.loads((folder / "0.json").read_text())
    errors = []
    for rank, worker in enumerate(group):
        file, place = folder / f"{rank}.json", f"(process {rank} of {len(group)})"
        if worker in unresponsive:
            errors.append((3, rank, f"a worker no longer answered {place}", 1, None))
        elif worker.returncode and file.is_file():
            error = json.loads(file.read_text())
            order = {"own": 0, "peer": 4}.get(error["kind"], 2)
            errors.append((order, file.stat().st_mtime, error["error"], error["exit_code"], error["signum"]))
        elif worker.returncode in ENDED_BY:
            interrupted = Interrupted(ENDED_BY[worker.returncode])
            errors.append((1, rank != first, f"{interrupted} {place}", interrupted.exit_code, interrupted.signum))
        elif worker.returncode == -signal.SIGABRT and len(group) > 1 and distributed.gpus():
            errors.append((4, rank != first, f"rank {rank}: aborted, as NCCL does where {PEER_FAILED}", 1, None))
        elif worker.returncode:
            errors.append((1, rank != first, f"{_describe_exit(worker.returncode)} {place}", 1, None))
    *_, text, code, signum = min(errors, key=lambda error: error[:2])
    raise WorkerError(text, code) from (Interrupted(signum) if signum else None)


def _describe_exit(returncode: int) -> str:
    if returncode > 0:
        return f"a worker ended with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"a worker was killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
