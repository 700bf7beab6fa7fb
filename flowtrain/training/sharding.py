"""``trainer.strategy=fsdp``: each process keeps a share of the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flowtrain.config.build import model_name
from flowtrain.config.schema import TrainConfig
from flowtrain.engine.ema import EMA
from flowtrain.engine.weights import Weights
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed


def is_sharded(config: TrainConfig) -> bool:
    """A single process has all weights whatever the strategy."""
    return config.trainer.strategy == "fsdp" and distributed.world() > 1


def check_sharding(config: TrainConfig, flow: Flow) -> None:
    """Raise UsageError where the weights of ``flow`` cannot be shared out as ``config`` asks."""
    if config.trainer.strategy != "fsdp":
        return
    from flowtrain.engine.sharded_weights import blocks

    asked = {"compile=true": config.compile is True, "memory=reversible": config.memory == "reversible"}
    for key, is_asked in asked.items():
        if is_asked:
            raise UsageError(f"{key}: not with trainer.strategy=fsdp, which gathers weights as layers need them")
    if not blocks(flow):
        raise UsageError(
            f"trainer.strategy=fsdp: gathers the blocks of transformers one after the other, and model="
            f"{model_name(config)} has none; model=tarflow has, and trainer.strategy=ddp trains any"
        )


def share_weights(flow: Flow, ema: EMA | None, device: torch.device) -> Callable[..., Weights]:
    """Share out the weights of ``flow`` and of its average. Returns what makes the Trainer's weights of them."""
    from flowtrain.engine.sharded_weights import ShardedWeights, shard

    outline = shard(flow, device)
    if ema:
        shard(ema.model, device)
    return partial(ShardedWeights, outline=outline)
