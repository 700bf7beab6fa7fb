"""``python -m flowtrain.training.compile_later JOB``: the process that :mod:`flowtrain.training.background` starts."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

import torch

from flowtrain.config.build import build_flow
from flowtrain.engine.compile_gain import measure
from flowtrain.errors import UsageError
from flowtrain.training.background import Job
from flowtrain.training.compilation import gradient_of
from flowtrain.training.setup import objective_of, set_arithmetic

LIMIT = 60 * 60  # seconds that it may take: where others need all cores, it hardly gets on


def run(job: Job) -> None:
    """Note what compiling the job's flow gains, with the compiled code in the cache."""
    torch.set_num_threads(job.threads[0])
    set_arithmetic(job.config)
    flow = build_flow(job.config, job.spec, "cpu")
    flow.load_state_dict(job.weights)
    step = gradient_of(flow, objective_of(job.config, job.spec), job.config, job.batch)
    try:
        job.known.write(measure(flow, step, whole=True, threads=job.threads)[1])
    except UsageError as error:
        job.known.write(str(error))


if __name__ == "__main__":
    os.nice(19)
    signal.alarm(LIMIT)
    file = Path(sys.argv[1])
    try:
        run(pickle.loads(file.read_bytes()))  # which a run of this user has written
    finally:
        file.unlink(missing_ok=True)
