"""Slows a run down at one place, so that a test can interrupt it there.

``SLOW`` in the environment names the place, which then takes half a minute and creates the file ``here.0``.
"""

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
from flowtrain.training import setup

STEP = 13  # places in training are slow from this step on
LONG = 30  # seconds
SAVING = 0.5  # seconds; saving a checkpoint is not interrupted


class OneSecond:
    """A datetime whose time stands still."""

    @staticmethod
    def now():
        return datetime(2026, 1, 1)


def wait_here(seconds: float = LONG) -> None:
    """Create the file ``here.RANK`` and wait."""
    Path(f"here.{os.environ.get('RANK', 0)}").touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)


def delay(owner, name: str, seconds: float = LONG, when=lambda *args: True) -> None:
    """Make calls of ``owner.name`` slow."""
    original = getattr(owner, name)

    def slow(*args, **kwargs):
        if when(*args):
            wait_here(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, slow)


def is_late(*_args) -> bool:
    """Whether training has come to ``STEP``."""
    return Trainer.at >= STEP


def slow_batches(self, step=0, original=Loader.batches):
    for number, batch in enumerate(original(self, step), step):
        if number >= STEP and number == Trainer.at + 1:
            wait_here()
        yield batch


def slow_moments(self, step=0, original=Loader.batches):
    """Batches that are slow where batch normalization computes its moments."""
    for number, batch in enumerate(original(self, step), step):
        if is_late() and number < STEP:
            wait_here(2)
        yield batch


def slow_split_batches(*args, original=evaluation.split_batches):
    """Slow batches of one example each."""
    for index, x, context in original(*args):
        for i in range(len(x)):
            if is_late():
                wait_here(1)
            yield index[i : i + 1], x[i : i + 1], None if context is None else context[i : i + 1]


def record_step(self, *args, original=Trainer.gradient):
    Trainer.at = self.step
    return original(self, *args)


def patch() -> None:
    """Make the place slow that the environment names."""
    Trainer.at, Trainer.gradient = 0, record_step
    places = {
        "check": lambda: delay(checks, "check"),
        "job": lambda: delay(jobs, "_run"),
        "import": lambda: delay(worker, "execute"),
        "open": lambda: delay(Vectors, "split"),
        "start": lambda: delay(setup, "start"),
        "data": lambda: setattr(Loader, "batches", slow_batches),
        "moments": lambda: setattr(Loader, "batches", slow_moments),
        "step": lambda: delay(Trainer, "update", SAVING, is_late),
        "every step": lambda: delay(Trainer, "update", 0.1),
        "stuck": lambda: delay(Trainer, "update", when=is_late),
        "validation": lambda: setattr(evaluation, "split_batches", slow_split_batches),
        "image": lambda: delay(previews.Preview, "__call__", when=is_late),
        "saving": lambda: delay(checkpoint, "save_last", SAVING),
        "end": lambda: delay(train, "conclude"),
        "one second": lambda: setattr(hydra.core.utils, "datetime", OneSecond),
    }
    places[os.environ["SLOW"]]()


if __name__ == "__main__":  # torchrun runs this script
    from flowtrain.cli import main

    patch()
    main.main()
