"""A batch forward and backward through a flow, in training and in the replay of a training step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowtrain.bijections.ode import replace_unsolved_by_nan, traced_layers
from flowtrain.data.batch import Batch
from flowtrain.engine.objectives import Objective
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch, modes
from flowtrain.runtime.seeds import seed_from


class TrainingPass:
    """Computes the gradient of an objective on a batch: Σ wᵢ lᵢ / B, where the weights w have mean one over the split.

    Args:
        seed: together with the step, it determines all noise.
        parts: number of parts that a batch is divided into, computed one after another (``trainer.accumulate``).
        autocast: dtype of networks, where that is lower than the weights'.

    Attributes:
        is_graph: whether a GPU gets the pass as one CUDA graph.
    """

    is_graph = False

    def __init__(
        self, flow: Flow, objective: Objective, seed: int, parts: int = 1, autocast: torch.dtype | None = None
    ):
        self.flow, self.seed, self.parts, self.autocast = flow, seed, parts, autocast
        self.loss: nn.Module = _Loss(flow, objective)
        # torch.manual_seed notes the seed for every kind of device, in longer than a small flow's optimizer steps
        on_cpu = all(parameter.device.type == "cpu" for parameter in flow.parameters())
        self._generators = torch.default_generator if on_cpu else torch

    def synchronize(self) -> None:
        """From now on, average the gradients over all processes.

        All backward passes use the same graph, except those of traces and of accumulated parts, of which only the last
        sends: torch fails an assertion where ``no_sync`` meets ``static_graph``.
        """
        self.loss = synchronize_gradients(self.loss, static_graph=self.parts == 1 and not traced_layers(self.flow))

    def backpropagate(self, batch: Batch, step: int, rank: int, world: int) -> tuple[Tensor, list[str]]:
        """Add the gradient of the mean loss on ``batch``, slice ``rank`` of the ``world`` slices of a global batch.

        Returns the loss, on its device, and why ODEs in it had no solution, which makes it NaN.
        """
        size, total = len(batch.x), 0.0
        with replace_unsolved_by_nan() as reasons:
            for row, part in self._parts(batch, step, rank):
                is_last = row + len(part.x) == (rank + 1) * size
                with nullcontext() if is_last else self._without_synchronization():
                    total = total + self.add_gradient(part, row, size, world)
        return total, reasons

    def add_gradient(self, part: Batch, row: int, size: int, world: int) -> Tensor:
        """Add the gradient of a part, from ``row`` of the global batch on, of a slice of ``size`` rows; returns its
        share of the slice's loss. The noise has been seeded."""
        x, context, weights = part
        with global_batch.rows(row, world * size), self._lower_precision(x.device.type):
            losses = self.loss(x, context)
            loss = (losses if weights is None else losses * weights).sum() / size
        loss.backward()
        return loss.detach()

    def seed_noise(self, step: int) -> None:
        """Seed torch's generators for a pass at ``step``."""
        self._generators.manual_seed(seed_from(self.seed, step))  # nothing to restore but the step

    @torch.no_grad()
    def repeat(self, batch: Batch, step: int, rank: int, world: int) -> None:
        """Run the flow on a batch as :meth:`backpropagate` does, with the same noise, but layer by layer and without
        gradients."""
        self.flow.train()
        with replace_unsolved_by_nan(), modes.using(layer_by_layer=True, repeating=True):
            for row, (x, context, _) in self._parts(batch, step, rank):
                with global_batch.rows(row, world * len(batch.x)), self._lower_precision(x.device.type):
                    self.flow(x, context)

    def _parts(self, batch: Batch, step: int, rank: int) -> Iterator[tuple[int, Batch]]:
        """The parts of a process's slice of a global batch, each with its first row there; seeds the noise of each."""
        row = rank * len(batch.x)
        for part in batch.chunk(self.parts):
            self.seed_noise(step)
            yield row, part
            row += len(part.x)

    def _without_synchronization(self):
        return self.loss.no_sync() if isinstance(self.loss, DistributedDataParallel) else nullcontext()

    def _lower_precision(self, device: str):
        return nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)


def synchronize_gradients(module: nn.Module, static_graph: bool) -> DistributedDataParallel:
    """``module``, with gradients that are averaged over all processes.

    Buffers are equal on all processes from the start and change alike, so none are sent.
    """
    device = next(module.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a newer torch names it otherwise, an older one only so
        return DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=static_graph,
        )


class _Loss(nn.Module):
    """``objective.loss(flow, batch)`` as a module: DistributedDataParallel wraps the forward pass of a module."""

    def __init__(self, flow: Flow, objective: Objective):
        super().__init__()
        self.flow, self.objective = flow, objective

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.objective.loss(self.flow, (x, context))
