"""What compiling a flow gains, measured in a process beside a run for the runs that follow.

The process has the lowest priority, and fills the cache of compiled code. The run itself does not change.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from flowtrain.config.schema import TrainConfig
from flowtrain.data.batch import Batch
from flowtrain.data.spec import DataSpec
from flowtrain.engine.compile_gain import Known
from flowtrain.engine.rehearsal import free_bytes

log = logging.getLogger("flowtrain")

FIRST, COUNTED = 32, 8  # steps: the one after which it may begin, and how many before it are timed
WORTH = 15.0  # seconds: no run that takes less is compiled for
ROOM = 3 * 2**30  # bytes that a compiler may need


@dataclass(frozen=True)
class Job:
    """A gradient to compile: a flow, its weights, a batch, the numbers of threads that a run chooses from, the largest
    first, and where the gain is noted."""

    config: TrainConfig
    spec: DataSpec
    weights: dict
    batch: Batch
    threads: list[int]
    known: Known


class BackgroundTrial:
    """Starts the process once the first steps of a run show that it is long enough.

    Args:
        job: makes what to compile.
    """

    def __init__(self, job: Callable[[], Job]):
        self.job = job
        self.times: list[float] = []
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Callable[[float, float], None]:
        return self.after_step

    def after_step(self, seconds: float, left: float) -> None:
        """To be called with the duration of each step and the number of steps that are left."""
        if len(self.times) >= FIRST:
            return
        self.times.append(seconds)
        if len(self.times) == FIRST and left * median(self.times[-COUNTED:]) >= WORTH:
            self._start()

    def _start(self) -> None:
        if free_bytes(torch.device("cpu")) < ROOM:
            return
        job = self.job()
        with suppress(OSError), job.known.lock() as lock:
            if lock is None:  # one at a time
                return
            job.known.job.write_bytes(pickle.dumps(job))
            self.process = start_process(job.known.job, lock)
            log.info(
                "compile=auto: process %d compiles this flow for later runs, at the lowest priority (compile=false: "
                "none does)",
                self.process.pid,
            )

    def __exit__(self, failed, *_) -> None:
        """Leave the process to itself, and say so; end it where the run has failed or was interrupted."""
        if self.process is None or self.process.poll() is not None:
            return
        if failed:
            self.process.terminate()
        else:
            log.info("compile=auto: process %d is still at work; runs after it has ended are faster", self.process.pid)


def start_process(job_file: Path, lock: int) -> subprocess.Popen:
    """A process that does a job, and holds the lock as long as it lives."""
    here = str(Path(__file__).resolve().parents[2])  # a checkout that is not installed
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "flowtrain.training.compile_later", str(job_file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        pass_fds=[lock],
        process_group=0,  # Ctrl-C is the run's
    )
