"""The errors that end a run, in one line."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from flowtrain.config.schema import TrainConfig
from flowtrain.engine.compiling import compile_errors
from flowtrain.engine.determinism import determinism_errors
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import files
from flowtrain.training.memory import memory_of_steps


@contextmanager
def one_line_errors(config: TrainConfig, trainer: Trainer, device: torch.device):
    """Raise FlowtrainError, with what may help, for the errors that end a run."""
    try:
        with memory_of_steps(config, device), compile_errors(), determinism_errors():
            yield
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error
    except files.WriteError as error:
        saved = any(trainer.checkpoints.directory.glob("*.pt"))
        how = "the same command with resume=true goes on from the last checkpoint" if saved else "nothing was saved yet"
        raise files.WriteError(f"{error}; {how}") from error
