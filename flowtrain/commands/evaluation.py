"""A flow on a split of the data, shared by all processes."""

from __future__ import annotations

from contextlib import nullcontext

from flowtrain.bijections.ode import exact_trace
from flowtrain.data import evaluation_batches
from flowtrain.data.split import Split
from flowtrain.engine.evaluate import Evaluation, evaluate
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed

EVALUATION_BATCH = 256  # fixed: dequantization noise in evaluation is a function of it


def judge(
    flow: Flow, split: Split, cfg, examples: int | None = None, draws: int = 1, exact: bool = False
) -> Evaluation:
    """Evaluate ``flow`` on a split with every process taking its share; ``exact``: with the exact trace of its ODEs.

    Raises:
        FlowtrainError: a likelihood is not finite.
    """
    batches = shares(split, cfg, next(flow.parameters()).device, examples)
    try:
        with exact_trace() if exact else nullcontext():
            return evaluate(flow, batches, len(split), draws, cfg.seed)
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error


def shares(split: Split, cfg, device, examples: int | None = None):
    """This process's batches of a split for evaluation: (indices, examples, context)."""
    rank, world = distributed.rank(), distributed.world()
    return evaluation_batches(split, EVALUATION_BATCH, device, rank, world, examples, cfg.trainer.workers)
