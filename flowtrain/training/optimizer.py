"""The optimizer of a run, its budget and the warm-up of its rate."""

from __future__ import annotations

import math
import re
from functools import partial

import torch

from flowtrain.config.build import build
from flowtrain.config.conversion import format_value
from flowtrain.config.schema import TrainConfig
from flowtrain.data.spec import DataSpec
from flowtrain.engine.auto import choose_learning_rate
from flowtrain.engine.budget import Budget
from flowtrain.engine.optimizers import UNSHIELDED
from flowtrain.errors import UsageError
from flowtrain.flow import Flow

KINDS = ("fused", "foreach", "capturable", "differentiable")  # keys that choose how an optimizer computes


def build_optimizer(config: TrainConfig, flow: Flow, rows: int, spec: DataSpec) -> torch.optim.Optimizer:
    """The configured optimizer for a train split of ``rows`` examples; weight decay reaches the parameters whose names
    match ``trainer.decay``."""
    try:
        decays = re.compile(config.trainer.decay)
    except re.error as error:
        raise UsageError(f"trainer.decay={config.trainer.decay}: no regular expression ({error})") from error
    named = list(flow.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays.search(name)]},
        {"params": [p for name, p in named if not decays.search(name)], "weight_decay": 0.0},
    ]
    node = config.optimizer
    if "lr" in node:
        node = node | {"lr": choose_learning_rate(node["lr"], rows, spec)}
    make = build(node, "optimizer", allow=config.allow)
    if make.func in UNSHIELDED and make.keywords.keys().isdisjoint(KINDS):
        real = not any(parameter.is_meta for _, parameter in named)
        make = partial(UNSHIELDED[make.func], fused=real, **make.keywords)  # fused: one function for all parameters
    try:
        return make([group for group in groups if group["params"]])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"optimizer: {error}") from error


def check_optimizer(config: TrainConfig, spec: DataSpec, device: torch.device) -> None:
    """Raise UsageError where the configured optimizer can take no step on ``device``: options that exclude each other
    or this device, or a class that needs more than gradients."""
    layer = torch.nn.ParameterDict({"weight": torch.zeros(2, 2, device=device)})
    layer["weight"].grad = torch.zeros(2, 2, device=device)
    try:
        build_optimizer(config, layer, 0, spec).step()
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        chosen = [f"optimizer.{key}={format_value(config.optimizer[key])}" for key in KINDS if key in config.optimizer]
        raise UsageError(f"{', '.join(chosen) or 'optimizer'}: it cannot take a step: {error}") from error


def budget_of(config: TrainConfig, steps_per_epoch: int) -> Budget:
    epochs = config.trainer.max_epochs
    limits = [limit for limit in (config.max_steps, epochs and math.ceil(epochs * steps_per_epoch)) if limit]
    if not limits and config.max_minutes is None:
        raise UsageError("no end: give max_steps, max_minutes or trainer.max_epochs")
    return Budget(min(limits, default=None), config.max_minutes)


def warmup_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    if not config.trainer.warmup_epochs:
        return config.trainer.warmup_steps
    return math.ceil(config.trainer.warmup_epochs * steps_per_epoch)
