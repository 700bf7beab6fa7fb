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

from flowtrain import distributed
from flowtrain.errors import FlowtrainError, Interrupted
from flowtrain.signals import SIGNALS, end_at_once, end_in_kernel

GRACE = 30  # seconds that the others have to end by themselves once a worker has failed,
SAVING = 600  # or once it has ended by a signal and they may still be writing


class Failed(FlowtrainError):
    """A worker's error, with its exit code."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def launch(job: dict, count: int) -> dict:
    """Run ``job`` (arguments of :func:`flowtrain.jobs.execute`) on ``count`` processes; rank 0's summary."""
    with tempfile.TemporaryDirectory(prefix="flowtrain-") as folder:
        payload = pickle.dumps({**job, "folder": folder})
        received: list[int] = []
        group: list[subprocess.Popen] = []

        def forward(signum, frame):
            received.append(signum)
            again = signum == signal.SIGINT and received.count(signum) > 1  # Ctrl-C twice: at once
            for worker in group:
                if worker.poll() is None:
                    worker.send_signal(signal.SIGKILL if again else signum)

        main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, forward) for number in SIGNALS} if main_thread else {}
        try:
            for rank in range(count):
                worker = subprocess.Popen(
                    [sys.executable, "-m", "flowtrain.workers"],
                    stdin=subprocess.PIPE,
                    env=_environment(rank, count, folder),
                    start_new_session=True,
                )
                group.append(worker)
                with suppress(BrokenPipeError):  # it has died already
                    worker.stdin.write(payload)
                    worker.stdin.flush()
            _wait(group)
        finally:
            for worker in group:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if received:
            raise Interrupted(received[0])
        return _outcome(group, Path(folder))


def _environment(rank: int, count: int, folder: str) -> dict:
    env = dict(os.environ)
    env.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    env.update(FLOWTRAIN_STORE=f"{folder}/store")
    env.setdefault("OMP_NUM_THREADS", str(max(1, distributed.cores() // count)))
    here = str(Path(__file__).resolve().parent.parent)  # a checkout that is not installed
    env["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [env.get("PYTHONPATH")])])
    return env


def _wait(group) -> None:
    """Until every worker has ended; once one has failed, the others are given some time."""
    since = None
    while any(worker.poll() is None for worker in group):
        failed = [worker.returncode for worker in group if worker.returncode]
        since = since or failed and time.monotonic()
        if failed and time.monotonic() - since > (SAVING if set(failed) <= {130, 143} else GRACE):
            return
        time.sleep(0.05)


def _outcome(group, folder: Path) -> dict:
    """Rank 0's summary, or the error that explains the others': flowtrain's own, then a kill, then the first."""
    if not any(worker.returncode for worker in group):
        return json.loads((folder / "0.json").read_text())
    errors = []
    for rank, worker in enumerate(group):
        file = folder / f"{rank}.json"
        if worker.returncode and file.is_file():
            error = json.loads(file.read_text())
            errors.append((0 if error["ours"] else 2, file.stat().st_mtime, error["error"], error["exit_code"]))
        elif worker.returncode:
            errors.append((1, 0, f"{_death(worker.returncode)} (process {rank} of {len(group)})", 1))
    _, _, text, code = min(errors)
    raise Failed(text, code)


def _death(returncode: int) -> str:
    if returncode > 0:
        return f"a worker ended with code {returncode}"
    name = signal.Signals(-returncode).name
    return f"a worker was killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")


def main() -> None:
    """A worker: take the job from stdin, run it, leave its summary or its error in the group's folder."""
    end_in_kernel()
    from flowtrain import cli, jobs

    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_follow_parent, daemon=True).start()
    file = Path(job.pop("folder")) / f"{distributed.rank()}.json"
    result, code = {}, 0
    try:
        distributed.init()
        end_at_once(announce=False)
        result = jobs.execute(**job) or {}
        distributed.close()
    except Exception as error:
        text, code = cli.explain(error, job["run_dir"])
        result = {"error": text, "exit_code": code, "ours": isinstance(error, FlowtrainError)}
    file.with_suffix(".tmp").write_text(json.dumps(result))
    file.with_suffix(".tmp").replace(file)
    cli.leave(code)


def _follow_parent() -> None:
    """When the parent is gone, end as if asked to."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
