"""What every objective offers to the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowtrain.engine.evaluate import Evaluation
from flowtrain.flow import Flow


@dataclass(frozen=True)
class Score:
    """An evaluation under an objective: the ``loss`` to compare (less is better); the figure as a number and text."""

    loss: float
    figure: float
    text: str


@runtime_checkable
class Objective(Protocol):
    """What training minimizes and what a run reports.

    One with a method ``begin_step(spent)`` is told, before each step, the share of the run's budget that is spent.

    One that trains only parts of a flow has ``prepare(flow)``, which fixes the others, and raises ValueError with the
    key at fault for a flow that it cannot train; its flows are started from at least ``start_rows`` examples. One whose
    loss says nothing of the figure by which weights are selected has ``train_key`` and ``train_unit`` for it, and
    ``measure(flow, x, context)``, (B,), for what validation averages over examples.

    Attributes:
        key: names the figure in metrics.jsonl and TensorBoard, as in ``train/<key>`` and ``val/<key>``.
        unit: of the figure.
    """

    key: str
    unit: str

    def loss(self, flow: Flow, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        """The losses of a batch, (B,), with gradients. ``batch``: x (B, *shape), and its context (B, *context_shape)
        or None.

        Called once for each backward pass. Any method of ``flow`` may be used: DistributedDataParallel wraps this call
        as a whole. Nothing should be read from the device. The training pass multiplies the losses by the examples'
        weights (``dataset.weights``), of which no objective need know.
        """
        ...

    def figure(self, flow: Flow, loss: float) -> float:
        """A mean of :meth:`loss` as people read it."""
        ...

    def score(self, evaluation: Evaluation) -> Score:
        """An evaluation of the validation split, to select the best weights by."""
        ...
