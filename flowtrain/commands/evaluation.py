"""Evaluating a flow on a split of the data, of which each process takes its share."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import torch

from flowtrain.bijections.ode import exact_trace
from flowtrain.commands.restored import Restored
from flowtrain.config.schema import TrainConfig
from flowtrain.data import evaluation_batches
from flowtrain.data.split import Split
from flowtrain.engine.evaluate import Evaluation, Measure, evaluate, evaluation_mode, log_likelihoods
from flowtrain.engine.memory_budget import even_batches, few_rows, rows_within_budget
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed


def evaluate_split(
    flow: Flow,
    split: Split,
    config: TrainConfig,
    examples: int | None = None,
    draws: int = 1,
    exact: bool = False,
    measure: Measure | None = None,
) -> Evaluation:
    """Evaluate ``flow`` on ``examples`` of a split (None: all), each by its weight; ``exact``: with the exact trace of
    its ODEs; ``measure``: in place of the split's own log-likelihood.

    Raises:
        FlowtrainError: a likelihood is not finite.
    """
    device = next(flow.parameters()).device
    total = len(split) if examples is None else min(examples, len(split))
    try:
        with exact_trace() if exact else nullcontext():
            measure = measure or split.measure
            rows = _batch_size(flow, split.to(device), total, measure)
            batches = split_batches(split, config, device, examples, rows)
            return evaluate(flow, batches, len(split), draws, config.seed, split.weights, measure)
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error


def data_digest(split: Split, restored: Restored) -> str:
    """A SHA-256 of a split and of what a likelihood of its examples means: equal where two models' are comparable. It
    changes with the examples and their order, their context and weights, grey levels, and the types of columns."""
    spec = restored.dataset.spec
    columns = [(one.name, one.kind, one.categories, one.width, one.missing) for one in spec.columns or ()]
    what = len(split), split.digest(), spec.shape, spec.grey_levels, spec.context, columns
    return hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()


def split_batches(split: Split, config: TrainConfig, device, examples: int | None = None, rows: int = 256):
    """This process's batches of at most ``rows`` of a split for evaluation: (indices, examples, context)."""
    rank, world = distributed.rank(), distributed.world()
    return evaluation_batches(split, rows, device, rank, world, examples, config.trainer.workers)


@torch.no_grad()
def _batch_size(flow: Flow, split: Split, total: int, measure: Measure) -> int:
    """The number of examples to evaluate at once, the same on every process."""
    few = few_rows(flow.dimensions)
    if total <= few:
        return even_batches(total, few, distributed.world())
    x, context = split.take(torch.arange(few))
    was_training = flow.training
    flow.eval()
    with evaluation_mode(x.device):
        index = torch.arange(few)
        most = rows_within_budget(lambda: log_likelihoods(flow, index, x, context, measure=measure), few, x.device)
    flow.train(was_training)
    return distributed.broadcast_object(even_batches(total, most, distributed.world()))
