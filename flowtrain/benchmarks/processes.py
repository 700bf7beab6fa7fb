"""Suite ``processes``: a training step of two processes, which share a batch and the cores, against one process.

``python -m flowtrain.benchmarks.processes FOLDER SETTINGS`` is one of the two.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.session import Load, Row, Session, row
from flowtrain.benchmarks.start_up import environment
from flowtrain.benchmarks.timing import time_in_turns
from flowtrain.benchmarks.training_steps import GLOW, IMAGES, SMOKE_GLOW, SMOKE_IMAGES, step
from flowtrain.engine.training_pass import synchronize_gradients
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import distributed

TWO, ONE = "two processes", "one process"


def rows(session: Session) -> Iterator[Row]:
    sizes, count = (SMOKE_GLOW, SMOKE_IMAGES) if session.smoke else (GLOW, IMAGES)
    settings = {"sizes": sizes, "count": count, "threads": torch.get_num_threads(), "rounds": session.rounds}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", __name__, folder, json.dumps({**settings, "seed": session.seed})]
        environments = [_environment(folder, rank) for rank in range(2)]
        ranks = [subprocess.Popen(words, env=each, stdout=subprocess.DEVNULL) for each in environments]
        try:
            while None in (codes := [process.poll() for process in ranks]) and not any(codes):
                time.sleep(0.1)
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            raise FlowtrainError("bench: two processes could not train together")
        times = json.loads((Path(folder) / "times.json").read_text())
    work = f"Glow training step, {sizes[0]}×{sizes[0]}, {count} images in all, {settings['threads']} threads in all"
    yield row("processes", work, times, TWO, ONE, None, Load(count, "images"))


def _environment(folder: str, rank: int) -> dict[str, str]:
    mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "FLOWTRAIN_STORE": f"{folder}/store"}
    return {**environment(), **mine}


def measure(sizes: list[int], count: int, threads: int, rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds a step by variant, a number each round: both processes on half of the batch each with half of the
    threads, and the first one alone with all of them."""
    x = torch.randn(count, 3, sizes[0], sizes[0], generator=torch.Generator().manual_seed(seed))
    half = x.chunk(2)[distributed.rank()]
    alone, shared = (ours.build_perturbed(partial(ours.glow, *sizes), x, seed) for _ in range(2))
    together = step(synchronize_gradients(shared, static_graph=True), ours.optimizer, half)
    single = step(alone, ours.optimizer, x)

    def two() -> None:
        torch.set_num_threads(max(1, threads // 2))
        together()

    def one() -> None:
        torch.set_num_threads(threads)
        if distributed.is_main():
            single()

    return time_in_turns({TWO: two, ONE: one}, rounds, float("inf"), random.Random(seed), dist.barrier, slice=1e-9)


def main() -> None:
    folder, settings = sys.argv[1:]
    distributed.init()
    times = measure(**json.loads(settings))
    if distributed.is_main():
        (Path(folder) / "times.json").write_text(json.dumps(times))
    distributed.barrier()
    distributed.close()
    os._exit(0)  # gloo's threads may keep a process that is done


if __name__ == "__main__":
    main()
