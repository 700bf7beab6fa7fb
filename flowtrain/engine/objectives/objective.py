"""What every objective offers to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flowtrain.engine.evaluate import Evaluation
from flowtrain.flow import Flow


@dataclass(frozen=True)
class Score:
    """An evaluation under an objective: the ``loss`` to compare (less is better); the figure as a number and text."""

    loss: float
    figure: float
    text: str


class Objective(ABC):
    """What training minimizes and what a run reports.

    Attributes:
        key: names the figure in metrics.jsonl and TensorBoard, as in ``train/<key>`` and ``val/<key>``.
        unit: of the figure.
        train_key, train_unit: of the figure in training, where it is not the one by which weights are selected.
        measure: ``measure(flow, x, context)``, (B,), of which validation takes the mean over examples; None for the
            log-likelihood.
        start_rows: examples from which flows are started, at least.
        runs_layers: whether the loss runs the flow's chain of layers, so that it may be compiled and recomputed.
    """

    key: str
    unit: str
    train_key: str | None = None
    train_unit: str | None = None
    measure: Callable[[Flow, Tensor, Tensor | None], Tensor] | None = None
    start_rows = 0
    runs_layers = True

    def prepare(self, flow: Flow) -> None:  # noqa: B027 - most need none
        """Fix what this does not train of a new flow. Raises ValueError with the key at fault where it cannot train
        ``flow``."""

    def begin_step(self, spent: float) -> None:  # noqa: B027
        """Note, before a step, the share of the run's budget that is spent."""

    @abstractmethod
    def loss(self, flow: Flow, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        """The losses of a batch, (B,), with gradients. ``batch``: x (B, *shape), and its context (B, *context_shape)
        or None.

        Called once for each backward pass. Any method of ``flow`` may be used: DistributedDataParallel wraps this call
        as a whole. Nothing should be read from the device. The training pass multiplies the losses by the examples'
        weights (``dataset.weights``), of which no objective need know.
        """

    @abstractmethod
    def figure(self, flow: Flow, loss: float) -> float:
        """A mean of :meth:`loss` as people read it."""

    @abstractmethod
    def score(self, evaluation: Evaluation) -> Score:
        """An evaluation of the validation split, to select the best weights by."""
