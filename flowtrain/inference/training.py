"""Training in the program that asks for it, within its minutes: no run directory, no signals, no files."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace

import torch

from flowtrain.commands.evaluation import evaluate_split
from flowtrain.config.compose import chosen_config, is_part
from flowtrain.config.schema import TrainConfig
from flowtrain.engine.auto import SMALL
from flowtrain.engine.evaluate import Evaluation
from flowtrain.engine.loggers import Loggers, NullLogger, progress
from flowtrain.engine.saving import InMemory
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.inference.given import Given
from flowtrain.runtime.interrupts import leave_signals
from flowtrain.runtime.seeds import TURN
from flowtrain.training.batch_size import batch_size_of
from flowtrain.training.errors import one_line_errors
from flowtrain.training.setup import SetUp, prepare, record_of

NODES = ("model", "objective", "optimizer", "scheduler", "trainer")  # whose keys a caller may set
KEYS = ("batch_size", "deterministic", "max_steps", "memory", "precision")
PATIENCE, VAL_EVERY = 20, 50  # validations without improvement; steps between those of a small table


def training_config(model: str, options: dict, rows: int, seed: int) -> TrainConfig:
    """The configuration of ``flowtrain train model=MODEL`` with ``options``, for a table of so many ``rows``.

    Raises:
        UsageError: there is no such model or key, or none that can be set here.
    """
    choices, values = {"model": model, "dataset": "table"}, {"compile": False, "seed": seed}
    values |= {
        "trainer.patience": PATIENCE,
        "trainer.sample_every": None,
        "trainer.save_every": None,
        "max_steps": None,
    }
    if rows < SMALL:
        values["trainer.val_every"] = VAL_EVERY
    for key, value in options.items():
        root = key.partition(".")[0]
        if "." not in key and (is_part(key) or key in ("objective", "optimizer", "scheduler", "trainer")):
            choices[key] = value
        elif root in NODES or root in KEYS or is_part(root):
            values[key] = value
        else:
            raise UsageError(
                f"options: {key} cannot be set here; {', '.join((*NODES, *KEYS))} and parts such as base can"
            )
    config = chosen_config(choices, values)
    if config.trainer.profile:
        raise UsageError("options: trainer.profile writes files; flowtrain train has it")
    return config


@dataclass(frozen=True)
class Trained:
    """A flow with its best weights, and how it came to them.

    Attributes:
        evaluation: of the best weights, on all rows for validation.
        history: figures by name, one mapping for each report and validation: "step", "seconds" where known, and the
            mean log-likelihood in nats, of "train" or of "validation".
    """

    flow: Flow
    evaluation: Evaluation
    steps: int
    seconds: float
    history: tuple[dict[str, float], ...]


class _InMemoryRun(SetUp):
    """A run without a directory."""

    @property
    def preview(self):
        return lambda flow: None

    def checkpoints(self) -> InMemory:
        return InMemory()


class _History(NullLogger):
    def open(self, run):
        self.keys, self.entries = {"train": run.train_key or run.key, "val": run.key}, []

    def scalars(self, step, values):
        for part, name in (("train", "train"), ("val", "validation")):
            if (key := f"{part}/{self.keys[part]}") in values:
                entry = {"step": step, name: values[key]}
                seconds = {"seconds": values["system/seconds"]} if "system/seconds" in values else {}
                self.entries.append(entry | seconds)


def train(config: TrainConfig, data: Given, device: torch.device, deadline: float, show: bool) -> Trained:
    """Train what ``config`` says until ``deadline``, by ``time.monotonic``, the evaluation at the end included.

    Raises:
        UsageError: something that ``config`` asks for cannot be.
        FlowtrainError: training failed.
    """
    history = _History()
    with TURN:
        run = _set_up(config, data, device, Loggers([history, *([progress()] if show else [])]))
        trainer = run.ready_trainer()
    with leave_signals(), one_line_errors(run.config, trainer, device):
        left = deadline - time.monotonic() - _seconds_of_the_end(trainer, data)
        trainer.budget = replace(trainer.budget, minutes=max(left, 1e-3) / 60 if math.isfinite(left) else None)
        try:
            run.loggers.open(record_of(run, trainer))
            trainer.fit()
        finally:
            run.loggers.close()
        if trainer.checkpoints.best is None:
            raise FlowtrainError("no validation had a finite likelihood; a lower optimizer.lr may help")
        flow = trainer.flow
        flow.load_state_dict(trainer.checkpoints.best)
        evaluation = evaluate_split(flow, data.val, run.config, draws=config.trainer.val_draws)
    flow.zero_grad()
    return Trained(flow.eval(), evaluation, trainer.step, trainer.seconds, tuple(history.entries))


def _seconds_of_the_end(trainer: Trainer, data: Given) -> float:
    """How long the last validation and the evaluation of the best weights will take."""
    for _ in range(2):  # the first is slower
        began = time.monotonic()
        trainer.validation.evaluate(trainer.flow)
    validated = min(trainer.config.trainer.val_examples or len(data.val), len(data.val))
    return (time.monotonic() - began) * (1 + len(data.val) / validated)


def _set_up(config: TrainConfig, data: Given, device: torch.device, loggers: Loggers) -> SetUp:
    _, objective, schedule = prepare(config, data.spec, device)
    splits = copy.copy(data.train), copy.copy(data.val)
    config = replace(config, max_minutes=math.inf)  # the deadline says when
    run = _InMemoryRun(config, "", data, *splits, device, objective, schedule, loggers, {}, None)
    return replace(run, config=replace(config, batch_size=batch_size_of(run)))
