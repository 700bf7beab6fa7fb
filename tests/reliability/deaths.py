"""Where a process kills itself, as ``DEATH`` says: {"place": …, "save": which save of last.pt, "byte": …}; and what
a resumed run may lack of its state, as ``OMIT`` names it. ``COMPOSED`` spares a run the composing."""

from __future__ import annotations

import json
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import torch

from flowtrain.cli import main, worker
from flowtrain.config import runs
from flowtrain.config.conversion import validate
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Loader
from flowtrain.engine.loggers import JsonLines
from flowtrain.engine.trainer import Trainer
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.runtime import checkpoint, files

PLACES = ("mid-write", "before fsync", "before rename", "after rename", "pruning")
OMITTED = ("model", "ema", "optimizer", "noise", "schedule", "order", "figures", "records")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(place: str, save: int = 1, byte: int = 0, part: int = 0) -> None:
    if place == "no links":
        os.link = _refuse
        main.main = _save_for_ever
    elif place == "any":
        main.main = _save_for_ever
    else:
        _count_saves(
            save,
            lambda: {
                "mid-write": lambda: _in_write(byte),
                "before fsync": lambda: _around(os, "fsync", before=lambda fd: stat.S_ISREG(os.fstat(fd).st_mode)),
                "before rename": lambda: _around(os, "replace", before=lambda _, path: path.name == "last.pt"),
                "after rename": lambda: _around(os, "replace", after=lambda _, path: path.name == "last.pt"),
                "pruning": lambda: _pruning(part),
            }[place](),
        )


def _count_saves(which: int, arm) -> None:
    """Call ``arm`` when last.pt is saved for the ``which``-th time."""
    save, seen = checkpoint.save_last, []

    def counted(*args):
        seen.append(1)
        if len(seen) == which:
            arm()
        return save(*args)

    checkpoint.save_last = counted


def _around(owner, name: str, before=lambda *args: False, after=lambda *args: False) -> None:
    original = getattr(owner, name)

    def deadly(*args):
        if before(*args):
            die()
        result = original(*args)
        if after(*args):
            die()
        return result

    setattr(owner, name, deadly)


def _in_write(byte: int) -> None:
    """When so many bytes of a checkpoint are on their way, of which the last part of a write is not."""
    write = checkpoint._Archive.write

    def deadly(self, data):
        if self.size + len(data) <= byte:
            return write(self, data)
        write(self, bytes(data)[: byte - self.size])
        self.file.flush()
        die()

    checkpoint._Archive.write = deadly


def _pruning(part: int) -> None:
    """Before and after each of the two moves by which the old last.pt becomes previous.pt."""
    if part < 2:
        arguments = {("before", "after")[part]: lambda *_: True}
        return _around(os, "link", **arguments)
    _around(os, "replace", **{("before", "after")[part - 2]: lambda _, path: path.name == "previous.pt"})


def _refuse(*_) -> None:
    raise PermissionError(1, "Operation not permitted")


def _save_for_ever() -> None:
    """A run that only saves, from where it stopped; each state tells its number in every part."""
    folder = Path.cwd()
    files.remove_temporary(folder)
    step = 0
    if (folder / "last.pt").exists():
        step = checkpoint.read(folder / "last.pt")["step"]
    while True:
        step += 1
        checkpoint.save_last({"step": step, "x": torch.full((20_000,), step)}, folder)
        checkpoint.save({"step": step, "x": torch.full((20_000,), step)}, folder / "best.pt")


def omit(part: str) -> None:
    """Resume as if the state did not hold ``part``."""
    load = Trainer.load_state_dict
    if part == "records":
        open_file = JsonLines.open
        JsonLines.open = lambda self, run: open_file(self, replace(run, records=None))

    def incomplete(self, state):
        fresh = self.state_dict()
        load(self, {**state, part: fresh[part]} if part in fresh else state)
        if part == "figures":
            self.validation.load_state_dict({**fresh["validation"], "step": self.validation.step})
            self.loss_sum, self.loss_count = 0.0, 0
        lost = self.step
        if part == "noise":
            backpropagate = TrainingPass.backpropagate
            TrainingPass.backpropagate = lambda self, x, context, step, *ranks: backpropagate(
                self, x, context, step - lost, *ranks
            )
        elif part == "schedule":
            factor = Trainer.rate_factor

            def anew(self):
                self.step -= lost
                try:
                    return factor(self)
                finally:
                    self.step += lost

            Trainer.rate_factor = anew
        elif part == "order":
            batches = Loader.batches
            Loader.batches = lambda self, step=0: batches(self, step - lost if step else step)

    Trainer.load_state_dict = incomplete


def _composed(file: str) -> None:
    """What ``flowtrain train … resume=true`` comes to when its configuration, in ``file``, has been composed: that
    alone takes a second."""
    folder = Path("outputs/moons/run").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = runs.newest_intact(folder / "checkpoints")
    values = {**json.loads(Path(file).read_text()), "resume": str(found) if found else None}
    worker.execute("train", validate(TrainConfig, values), str(folder))


def prepare(environment) -> None:
    if "COMPOSED" in environment:
        main.main = lambda: _composed(environment["COMPOSED"])
    if "DEATH" in environment:
        patch(**json.loads(environment["DEATH"]))
    if "OMIT" in environment:
        omit(environment["OMIT"])
