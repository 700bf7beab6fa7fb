"""Evaluating a flow on a split of the data, of which each process takes its share."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from flowtrain.bijections.ode import exact_trace, several_probes
from flowtrain.commands.restored import Restored
from flowtrain.config.schema import TrainConfig
from flowtrain.data import evaluation_batches
from flowtrain.data.split import Split
from flowtrain.engine.evaluate import Evaluation, Measure, evaluate, evaluation_mode, log_likelihoods
from flowtrain.engine.memory_budget import even_batches, few_rows, rows_within_budget
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed, global_batch


def evaluate_split(
    flow: Flow,
    split: Split,
    config: TrainConfig,
    examples: int | None = None,
    draws: int = 1,
    exact: bool = False,
    zeros: bool = False,
    measure: Measure | None = None,
    probes: int = 1,
) -> Evaluation:
    """Evaluate ``flow`` on ``examples`` of a split (None: all), each by its weight; ``exact``: with exact
    traces, else with the mean of ``probes`` stochastic ones; ``zeros``: a likelihood may be 0; ``measure``: what to
    average, None: the split's own.

    Raises:
        FlowtrainError: a likelihood is not finite.
    """
    device = next(flow.parameters()).device
    total = len(split) if examples is None else min(examples, len(split))
    measure = measure or split.measure
    try:
        with exact_trace() if exact else nullcontext():
            split.to(device)
            rows = _batch_size(flow, split, total, _Probed(measure, probes, len(split), device))
            batches = split_batches(split, config, device, examples, rows)
            probed = _Probed(measure, probes, len(split), device)
            result = evaluate(flow, batches, len(split), draws, config.seed, split.weights, probed, zeros)
            return probed.complete(result, split.weights)
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error


class _Probed:
    """Measures with the mean of several noises of stochastic traces, and the variance of that, for each example."""

    def __init__(self, measure: Measure, probes: int, total: int, device):
        self.measure, self.probes = measure, probes
        self.variance = torch.zeros(total, dtype=torch.float64, device=device)  # summed over draws

    def __call__(self, flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
        if self.probes == 1:
            return self.measure(flow, x, context)
        with several_probes(self.probes) as spreads:
            result = self.measure(flow, x, context)
        self.variance[global_batch.example_numbers()] += sum(spreads, torch.zeros_like(result)).double()
        return result

    def complete(self, result: Evaluation, weights: Tensor | None) -> Evaluation:
        """``result`` with the errors of the traces."""
        variance = distributed.all_sum(self.variance).cpu() / result.draws**2
        weights = (torch.ones_like(variance) if weights is None else weights.cpu().double()) * ~result.each.isnan()
        stderr = ((weights.square() * variance).sum().sqrt() / weights.sum()).item()
        mean = (weights * variance).sum() / weights.sum()
        return replace(result, probes_stderr=stderr, trace_variance=mean.item() * result.draws * self.probes)


def data_digest(split: Split, restored: Restored) -> str:
    """A SHA-256 of a split and of what a likelihood of its examples means: equal where two models' are comparable. It
    changes with the examples and their order, their context and weights, grey levels, and the types of columns."""
    spec = restored.dataset.spec
    columns = [(one.name, one.kind, one.categories, one.width, one.missing) for one in spec.columns or ()]
    what = len(split), split.digest(), spec.shape, spec.grey_levels, spec.context, columns
    return hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()


def split_batches(split: Split, config: TrainConfig, device, examples: int | None = None, rows: int = 256):
    """This process's batches of at most ``rows`` of a split for evaluation: (indices, examples, context)."""
    place = distributed.rank(), distributed.world()
    as_many = config.trainer.strategy == "fsdp"  # whose processes gather weights together
    return evaluation_batches(split, rows, device, *place, examples, config.trainer.workers, as_many)


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
