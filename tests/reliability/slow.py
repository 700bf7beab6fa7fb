"""Where a run can be caught: each place takes half a minute once ``SLOW`` names it, and leaves a file ``here.0``."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

import hydra.core.utils

from flowtrain import train
from flowtrain.cli import checks, jobs, worker
from flowtrain.commands import evaluation, previews
from flowtrain.data import Loader
from flowtrain.data.vectors import Vectors
from flowtrain.engine.trainer import Trainer
from flowtrain.runtime import checkpoint

STEP = 13  # of training, from which on what belongs to training is slow
LONG = 30  # seconds
SAVING = 0.5  # seconds: a checkpoint is finished


class OneSecond:
    """The same one whenever it is asked."""

    @staticmethod
    def now():
        return datetime(2026, 1, 1)


def linger(seconds: float = LONG) -> None:
    Path(f"here.{os.environ.get('RANK', 0)}").touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)


def before(owner, name: str, seconds: float = LONG, when=lambda *args: True) -> None:
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        if when(*args):
            linger(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, slow)


def late(*_args) -> bool:
    return Trainer.at >= STEP


def batches(self, step=0, original=Loader.batches):
    for number, batch in enumerate(original(self, step), step):
        if number >= STEP and number == Trainer.at + 1:
            linger()
        yield batch


def again(self, step=0, original=Loader.batches):
    """Those that batch normalization takes its moments from."""
    for number, batch in enumerate(original(self, step), step):
        if late() and number < STEP:
            linger(2)
        yield batch


def split_batches(*args, original=evaluation.split_batches):
    """One example a batch, and all are slow."""
    for index, x, context in original(*args):
        for i in range(len(x)):
            if late():
                linger(1)
            yield index[i : i + 1], x[i : i + 1], None if context is None else context[i : i + 1]


def following_the_step(self, *args, original=Trainer.gradient):
    Trainer.at = self.step
    return original(self, *args)


def patch() -> None:
    Trainer.at, Trainer.gradient = 0, following_the_step
    places = {
        "check": lambda: before(checks, "check"),
        "job": lambda: before(jobs, "_run"),
        "import": lambda: before(worker, "execute"),
        "open": lambda: before(Vectors, "split"),
        "start": lambda: before(train, "_start"),
        "data": lambda: setattr(Loader, "batches", batches),
        "moments": lambda: setattr(Loader, "batches", again),
        "step": lambda: before(Trainer, "update", SAVING, late),
        "every step": lambda: before(Trainer, "update", 0.1),
        "stuck": lambda: before(Trainer, "update", when=late),
        "validation": lambda: setattr(evaluation, "split_batches", split_batches),
        "image": lambda: before(previews.Preview, "__call__", when=late),
        "saving": lambda: before(checkpoint, "save_last", SAVING),
        "end": lambda: before(train, "_conclude"),
        "one second": lambda: setattr(hydra.core.utils, "datetime", OneSecond),
    }
    places[os.environ["SLOW"]]()


if __name__ == "__main__":  # as a script of torchrun's
    from flowtrain.cli import main

    patch()
    main.main()
