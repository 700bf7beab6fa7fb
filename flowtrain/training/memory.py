"""What takes a device's memory in training, and which keys make it take less."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from flowtrain.config.schema import TrainConfig
from flowtrain.engine.out_of_memory import more_memory, out_of_memory
from flowtrain.engine.precision import supports
from flowtrain.runtime import distributed


def memory_of_steps(config: TrainConfig, device: torch.device, size: int | None = None) -> AbstractContextManager:
    """For training steps, on ``size`` examples a device; None: those of the batch."""
    size = size or config.batch_size // distributed.world()
    keys = ["a smaller batch_size", "a larger trainer.accumulate", "more devices"] if size > 1 else ["a smaller model"]
    keys += {"none": ["memory=checkpoint"], "checkpoint": ["memory=reversible"]}.get(config.memory, [])
    keys += ["precision=bfloat16"] if config.precision != "bfloat16" and supports(device, "bfloat16") else []
    what = f"a training step on {size} example{'s' * (size > 1)} a device"
    less = ", ".join(keys[:-1]) + " or " * (len(keys) > 1) + keys[-1]
    return out_of_memory(device, what, f"{less} would need less")


def memory_of_weights(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """For a flow, its average and its optimizer."""
    return out_of_memory(device, "the weights and the optimizer", _smaller_model(config, device))


def memory_of_start(device: torch.device, size: int) -> AbstractContextManager:
    """For initializing a flow from ``size`` examples."""
    what = f"the data-dependent start, on {size} examples in one process"
    return out_of_memory(device, what, "a smaller trainer.init_batch would need less")


def memory_of_validation(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """For evaluating a flow beside what training keeps."""
    return out_of_memory(device, "a validation, beside what training keeps", _smaller_model(config, device))


def _smaller_model(config: TrainConfig, device: torch.device) -> str:
    ema = " or trainer.ema=null" if config.trainer.ema else ""
    return f"a smaller model{ema} would need less; {more_memory(device)}"
