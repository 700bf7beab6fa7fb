"""A training pass that a GPU gets as one CUDA graph, in place of thousands of kernels one by one."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from flowtrain.bijections.ode import replace_unsolved_by_nan
from flowtrain.data.batch import Batch
from flowtrain.engine.memory_budget import budget
from flowtrain.engine.objectives import Objective
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import modes
from flowtrain.runtime.cuda_graph import Graph, difference, reason

log = logging.getLogger("flowtrain")

# relative, of the loss, the gradient and the buffers: the same kernels, but atomic additions come in any order
ROUNDING, ROUNDING_BFLOAT16 = 1e-3, 1e-2


class GraphedPass(TrainingPass):
    """Computes what :class:`TrainingPass` computes, in a process that trains alone on a GPU.

    The first batch is computed without a graph, and kept. With it in its place a graph is recorded when the second
    comes, which is then computed both ways. So a graph that repeats numbers of the batch, the noise or the step that it
    was recorded with is found out. Where loss, gradients and buffers agree but for roundings, or to the bit under
    ``deterministic=true``, the graph computes all batches from then on. Batches of another form, and work layer by
    layer, are computed without it.

    Args:
        required: a pass that cannot be a graph is an error, not a warning.
    """

    def __init__(
        self, flow: Flow, objective: Objective, seed: int, autocast: torch.dtype | None = None, *, required: bool
    ):
        super().__init__(flow, objective, seed, autocast=autocast)
        self.required, self.given_up = required, False
        self.parameters = [*flow.parameters()]
        self.batch: Batch | None = None  # where the graph reads its batch
        self.graph: Graph[Tensor] | None = None
        self.gradients: list[Tensor | None] = []  # where it writes them

    @property
    def is_graph(self) -> bool:
        return self.graph is not None

    def backpropagate(self, batch, step, rank, world):
        """As :meth:`TrainingPass.backpropagate` does, but the next call writes over the gradients, and none may have
        been there before.

        Raises:
            FlowtrainError: the pass cannot be a graph, which is ``required``.
        """
        if self.given_up or modes.current().layer_by_layer or self.batch and _form(batch) != _form(self.batch):
            return super().backpropagate(batch, step, rank, world)
        if self.batch is None:
            self.batch = Batch(*(one if one is None else one.clone() for one in batch))
            return super().backpropagate(batch, step, rank, world)
        if self.graph is None:
            return self._compute_both_ways(batch, step)
        return self._replay(batch, step).clone(), []

    def _replay(self, batch: Batch, step: int) -> Tensor:
        for own, new in zip(self.batch, batch):
            if own is not None:
                own.copy_(new, non_blocking=True)
        self.seed_noise(step)
        loss = self.graph.replay()
        self._set_gradients(self.gradients)
        return loss

    def _compute_both_ways(self, batch: Batch, step: int) -> tuple[Tensor, list[str]]:
        before = self._buffers()
        loss, reasons = super().backpropagate(batch, step, 0, 1)
        gradients, after = self._gradients(), self._buffers()
        plain = [[loss], gradients, after]
        if not all(one.isfinite().all() for one in _numbers([loss], gradients)):
            return loss, reasons  # it says nothing of a graph: the next batch may
        try:
            self.graph = Graph(self._record, batch.x.device)
            self.gradients = self._gradients()
            self._check_memory(batch.x.device)
            self._set_buffers(before)
            replayed = [[self._replay(batch, step)], self.gradients, self._buffers()]
            self._check_equal(plain, replayed)
        except Exception as error:  # of torch and CUDA, of many kinds
            self._give_up(error)
            self._set_gradients(gradients)
            self._set_buffers(after)
            return loss, reasons
        log.info("cuda_graph: from step %d on a pass is one launch; it agrees with the pass without", step)
        return replayed[0][0].clone(), reasons

    def _record(self) -> Tensor:
        """The work of the graph. Without gradients before, it makes some, and a replay writes them anew."""
        self._set_gradients([None] * len(self.parameters))
        size = len(self.batch.x)
        with replace_unsolved_by_nan():  # the modes of other passes: what is compiled is compiled for them
            return self.add_gradient(self.batch, 0, size, 1)

    def _check_memory(self, device: torch.device) -> None:
        """A graph keeps the memory of a step for itself. A validation needs some beside it."""
        free = torch.cuda.mem_get_info(device)[0]
        if free < budget(device) and not self.required:
            raise RuntimeError(f"beside it only {free / 2**30:.1f} GiB would be left for validations")

    def _check_equal(self, plain: list[list], replayed: list[list]) -> None:
        rounding = ROUNDING if self.autocast is None else ROUNDING_BFLOAT16
        limit = 0.0 if torch.are_deterministic_algorithms_enabled() else rounding
        for what, one, other in zip(("loss", "gradient", "buffers"), plain, replayed):
            if not (error := difference(one, other)) <= limit:
                raise RuntimeError(f"its {what} differs by {error:.2g} from that without it, more than rounding")

    def _give_up(self, error: Exception) -> None:
        self.batch, self.graph, self.gradients, self.given_up = None, None, [], True
        if self.required:
            if isinstance(error, torch.OutOfMemoryError):
                raise error
            raise FlowtrainError(f"trainer.cuda_graph=true: does not work here ({reason(error)}); use false") from error
        log.warning("cuda_graph=auto: trains without (%s); trainer.cuda_graph=false does not try", reason(error))

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.parameters]

    def _set_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient

    def _buffers(self) -> list[Tensor]:
        """Copies of the flow's buffers: a pass moves the moments of batch normalization."""
        return [buffer.clone() for buffer in self.flow.buffers()]

    @torch.no_grad()
    def _set_buffers(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.flow.buffers(), values):
            buffer.copy_(value)


def _form(batch: Batch) -> list:
    return [one if one is None else (one.shape, one.dtype, one.device) for one in batch]


def _numbers(*lists: list) -> list[Tensor]:
    return [one for each in lists for one in each if one is not None]
