"""The weights that a run starts from."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch

from flowtrain.bijections.columns import fit_to_columns
from flowtrain.bijections.ode import replace_solutions
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Loader, Split
from flowtrain.engine.ema import EMA
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed
from flowtrain.runtime.checkpoint import load_weights
from flowtrain.training.memory import memory_of_start

log = logging.getLogger("flowtrain")

FIT_EXAMPLES, FIT_NUMBERS = 2**17, 2**26  # most examples that layers are fitted to, and numbers in them


def start(flow: Flow, config: TrainConfig, train, device, rows: int = 0) -> None:
    """Weights from ``init``, or a data-dependent start from the first global batch, the same on every process; or, for
    an objective that does not train what is started, from ``rows`` examples, where that has fewer.

    The first process sees the whole batch and sends the others its weights and buffers.
    """
    if config.init:
        log.info("weights from %s (%s)", config.init, load_weights(flow, checkpoint.read(config.init)))
    elif distributed.is_main():
        fit_to_data(flow, train, config.seed)
        size = min(config.trainer.init_batch or max(config.batch_size, rows), len(train))
        torch.manual_seed(config.seed)
        with memory_of_start(torch.device(device), size):
            first = next(Loader(train, size, config.seed, None, device).batches())
            with replace_solutions(lambda layer, x, context: x) if rows else nullcontext():  # no new one moves x
                flow.initialize(first.x, first.context)
    distributed.broadcast(flow.state_dict().values())


def fit_to_data(flow: Flow, train: Split, seed: int) -> None:
    """Fit the layers that depend on the train split: on a table's columns, on evenly spaced examples."""
    if not any(hasattr(module, "fit") for module in flow.modules()):
        return
    torch.manual_seed(seed)
    count = max(1, min(len(train), FIT_EXAMPLES, FIT_NUMBERS // flow.dimensions))
    rows, _ = train.take(torch.arange(count) * len(train) // count)
    try:
        fit_to_columns(flow.bijection, train.columns, rows.float())
    except ValueError as error:
        raise UsageError(f"preprocess: {error}") from error


def average_of(flow: Flow, config: TrainConfig) -> EMA | None:
    """The average of the flow's weights, where ``trainer.ema`` asks for one."""
    return EMA(flow, config.trainer.ema) if config.trainer.ema else None
