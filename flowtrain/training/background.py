"""The process beside a run that compiles its flow, and measures what that gains.

The process has the lowest priority, and fills the cache of compiled code. The run itself does not wait for it.
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

import torch

from flowtrain.config.schema import TrainConfig
from flowtrain.data.batch import Batch
from flowtrain.data.spec import DataSpec
from flowtrain.engine.compile_gain import Known
from flowtrain.engine.rehearsal import free_bytes

log = logging.getLogger("flowtrain")

ROOM = 3 * 2**30  # bytes that a compiler may need


@dataclass(frozen=True)
class Job:
    """A gradient to compile: a flow, its weights, a batch, the numbers of threads to try, the largest first, and where
    the gain is noted."""

    config: TrainConfig
    spec: DataSpec
    weights: dict
    batch: Batch
    threads: list[int]
    known: Known


class BackgroundProcess:
    """A process of a run.

    Args:
        job: makes what to compile.
    """

    def __init__(self, job: Callable[[], Job]):
        self.job = job
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process, once in a run, unless that of another run is at work or there is too little memory."""
        if self.process or free_bytes(torch.device("cpu")) < ROOM:
            return
        job = self.job()
        with suppress(OSError), job.known.lock() as lock:
            if lock is None or job.known.read() is not None:
                return
            job.known.job.write_bytes(pickle.dumps(job))
            self.process = start_process(job.known.job, lock)
            log.info(
                "compile=auto: process %d compiles this flow beside the run, at the lowest priority (compile=false: "
                "none does)",
                self.process.pid,
            )

    def leave(self, failed: bool) -> None:
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
