"""Evaluating a flow on a split of the data, of which each process takes its share."""

from __future__ import annotations

from contextlib import nullcontext

from flowtrain.bijections.ode import exact_trace
from flowtrain.config.schema import TrainConfig
from flowtrain.data import evaluation_batches
from flowtrain.data.split import Split
from flowtrain.engine.evaluate import Evaluation, evaluate
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed

EVALUATION_BATCH = 256  # fixed: dequantization noise in evaluation is a function of it


def evaluate_split(
    flow: Flow, split: Split, config: TrainConfig, examples: int | None = None, draws: int = 1, exact: bool = False
) -> Evaluation:
    """Evaluate ``flow`` on ``examples`` of a split (None: all), each by its weight; ``exact``: with the exact trace of
    its ODEs.

    Raises:
        FlowtrainError: a likelihood is not finite.
    """
    batches = split_batches(split, config, next(flow.parameters()).device, examples)
    try:
        with exact_trace() if exact else nullcontext():
            return evaluate(flow, batches, len(split), draws, config.seed, split.weights)
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error


def split_batches(split: Split, config: TrainConfig, device, examples: int | None = None):
    """This process's batches of a split for evaluation: (indices, examples, context)."""
    rank, world = distributed.rank(), distributed.world()
    return evaluation_batches(split, EVALUATION_BATCH, device, rank, world, examples, config.trainer.workers)
