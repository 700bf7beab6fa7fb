"""The seconds of a training step of ``flowtrain train``, beside those of a bare loop, for ``flowtrain bench``.

``python -m flowtrain.training.step_time rounds=N seconds=S seed=N WORD …`` prints them, a number a round, as JSON.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from flowtrain.benchmarks.timing import Times, time_in_turns
from flowtrain.config.compose import train_config
from flowtrain.runtime import allocator
from flowtrain.runtime.interrupts import SignalNote
from flowtrain.training.optimizer import build_optimizer
from flowtrain.training.setup import record_of, set_up

SLICE = 0.3  # seconds of a turn: some steps log, most do not


def measure(words: list[str], rounds: int, seconds: float, seed: int) -> Times:
    """Seconds a step by variant, a number each round. Both are eager and have the same threads."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        config = train_config(*words, "compile=false", f"threads={threads}", "max_steps=1000000")
        run = set_up(config, folder)
        trainer = run.ready_trainer()
        run.loggers.open(record_of(run, trainer))
        variants = {"flowtrain train": _typed(trainer), "bare loop": _bare(trainer, run)}
        try:
            return time_in_turns(variants, rounds, seconds, random.Random(seed), lambda: None, SLICE)
        finally:
            run.loggers.close()


def _typed(trainer) -> Callable[[], object]:
    """A step as a run takes it between two validations: with its data, average, clipping, finite gate and log."""
    batches, began, noted = trainer.loader.batches(), time.monotonic(), SignalNote()
    return lambda: trainer.advance(batches, began, noted)


def _bare(trainer, run) -> Callable[[], object]:
    flow, batch = copy.deepcopy(trainer.flow).train(), next(trainer.loader.batches())
    optimizer = build_optimizer(run.config, flow, len(run.train), run.spec)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        flow(batch.x, batch.context).mean().neg().backward()
        optimizer.step()

    return step


def main() -> None:
    allocator.keep_freed_memory()  # as the command does
    rounds, seconds, seed, *words = sys.argv[1:]
    rounds, seconds, seed = (float(word.partition("=")[2]) for word in (rounds, seconds, seed))
    found = measure(words, int(rounds), seconds, int(seed))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
