"""A training step's way through a flow, forward and backward. The replay of a step takes the same."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowtrain.bijections.ode import unsolved_is_nan
from flowtrain.engine.measure import Measure
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch
from flowtrain.runtime.seeds import mix


@dataclass(frozen=True)
class Way:
    """How a batch goes through a flow.

    Attributes:
        measure: what is minimized.
        seed: with the step, it makes all noise.
        parts: that a slice is worked on in, one after another.
        autocast: the dtype of networks, where that is lower than the weights'.
    """

    measure: Measure
    seed: int
    parts: int
    autocast: torch.dtype | None

    def backpropagate(
        self, flow: Flow, wrapped: nn.Module, x: Tensor, context: Tensor | None, step: int, rank: int, world: int
    ) -> tuple[Tensor, list[str]]:
        """Add the gradient of the mean loss on ``x``, slice ``rank`` of the ``world`` slices of a global batch.

        ``wrapped`` is ``flow``, or what shares its gradients with other processes. Returns the loss, on its device, and
        why ODEs in it had no solution, which makes it NaN.
        """
        parts = x.chunk(self.parts)
        contexts = [None] * len(parts) if context is None else context.chunk(self.parts)
        row, loss = rank * len(x), 0.0
        with unsolved_is_nan() as reasons:
            for i, (part, context) in enumerate(zip(parts, contexts)):
                torch.manual_seed(mix(self.seed, step))  # nothing to restore but the step
                with nullcontext() if i == len(parts) - 1 or wrapped is flow else wrapped.no_sync():
                    with global_batch.rows(row, world * len(x)), self._lower(x.device.type):
                        log_prob = wrapped(part, context)
                        part_loss = self.measure.loss(log_prob, flow.dimensions).sum() / len(x)
                    part_loss.backward()
                loss, row = loss + part_loss.detach(), row + len(part)
        return loss, reasons

    def _lower(self, device: str):
        return nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)
