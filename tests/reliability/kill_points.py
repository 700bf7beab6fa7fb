"""Points at which a process kills itself, and parts of the state that a resumed run lacks.

The environment chooses: ``KILL_AT`` is {"place": …, "save": which save of last.pt, "byte": …}, ``OMIT`` names a part of
the state, and ``VALUES`` is a file with the configuration, so that a run need not compose it.
"""

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


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(place: str, save: int = 1, byte: int = 0, part: int = 0) -> None:
    """Make this process kill itself at ``place`` of the ``save``-th save of last.pt."""
    if place == "no links":
        os.link = _raise_permission_error
        main.main = _save_repeatedly
    elif place == "any":
        main.main = _save_repeatedly
    else:
        _at_save(
            save,
            lambda: {
                "mid-write": lambda: _kill_in_write(byte),
                "before fsync": lambda: _kill_around(os, "fsync", before=lambda fd: stat.S_ISREG(os.fstat(fd).st_mode)),
                "before rename": lambda: _kill_around(os, "replace", before=lambda _, path: path.name == "last.pt"),
                "after rename": lambda: _kill_around(os, "replace", after=lambda _, path: path.name == "last.pt"),
                "pruning": lambda: _kill_in_pruning(part),
            }[place](),
        )


def _at_save(which: int, arm) -> None:
    """Call ``arm`` when last.pt is saved for the ``which``-th time."""
    save, calls = checkpoint.save_last, []

    def count(*args):
        calls.append(1)
        if len(calls) == which:
            arm()
        return save(*args)

    checkpoint.save_last = count


def _kill_around(owner, name: str, before=lambda *args: False, after=lambda *args: False) -> None:
    """Kill this process before or after a call of ``owner.name`` if the function of that name accepts its arguments."""
    original = getattr(owner, name)

    def patch(*args):
        if before(*args):
            kill_self()
        result = original(*args)
        if after(*args):
            kill_self()
        return result

    setattr(owner, name, patch)


def _kill_in_write(byte: int) -> None:
    """Kill this process once ``byte`` bytes of a checkpoint are written."""
    write = checkpoint._Archive.write

    def patch(self, data):
        if self.size + len(data) <= byte:
            return write(self, data)
        write(self, bytes(data)[: byte - self.size])
        self.file.flush()
        kill_self()

    checkpoint._Archive.write = patch


def _kill_in_pruning(part: int) -> None:
    """Kill this process before or after one of the two steps by which the old last.pt becomes previous.pt."""
    if part < 2:
        arguments = {("before", "after")[part]: lambda *_: True}
        return _kill_around(os, "link", **arguments)
    _kill_around(os, "replace", **{("before", "after")[part - 2]: lambda _, path: path.name == "previous.pt"})


def _raise_permission_error(*_) -> None:
    raise PermissionError(1, "Operation not permitted")


def _save_repeatedly() -> None:
    """Save checkpoints without end, starting after the last one. Every part of a state holds its number."""
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
    """Make a resumed run ignore ``part`` of its state."""
    load = Trainer.load_state_dict
    if part == "records":
        open_file = JsonLines.open
        JsonLines.open = lambda self, run: open_file(self, replace(run, records=None))

    def load_without_part(self, state):
        fresh = self.state_dict()
        load(self, {**state, part: fresh[part]} if part in fresh else state)
        if part == "figures":
            self.validation.load_state_dict({**fresh["validation"], "step": self.validation.step})
            self.loss_sum, self.loss_count = 0.0, 0
        start = self.step
        if part == "noise":
            backpropagate = TrainingPass.backpropagate
            TrainingPass.backpropagate = lambda self, batch, step, *ranks: backpropagate(
                self, batch, step - start, *ranks
            )
        elif part == "schedule":
            factor = Trainer.rate_factor

            def restarted_rate_factor(self):
                self.step -= start
                try:
                    return factor(self)
                finally:
                    self.step += start

            Trainer.rate_factor = restarted_rate_factor
        elif part == "order":
            batches = Loader.batches
            Loader.batches = lambda self, step=0: batches(self, step - start if step else step)

    Trainer.load_state_dict = load_without_part


def _train(file: str) -> None:
    """Run ``flowtrain train … resume=true`` with the configuration in ``file``: composing it takes a second."""
    folder = Path("outputs/moons/run").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = runs.newest_intact(folder / "checkpoints")
    values = {**json.loads(Path(file).read_text()), "resume": str(found) if found else None}
    worker.execute("train", validate(TrainConfig, values), str(folder))


def prepare(environment) -> None:
    """Patch this process as the environment says."""
    if "VALUES" in environment:
        main.main = lambda: _train(environment["VALUES"])
    if "KILL_AT" in environment:
        patch(**json.loads(environment["KILL_AT"]))
    if "OMIT" in environment:
        omit(environment["OMIT"])
