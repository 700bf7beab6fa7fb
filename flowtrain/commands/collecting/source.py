"""What material is gathered from, and the time that it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from flowtrain.bijections import Autoregressive
from flowtrain.bijections.bijection import walk
from flowtrain.commands.draws import draw_samples
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Columns, Split
from flowtrain.data.spec import DataSpec
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.report.material import Material


@dataclass(frozen=True)
class Amounts:
    """How much is gathered.

    Attributes:
        examples: most examples evaluated of each split.
        n: samples at each temperature.
        temperatures: of the samples of images.
        seconds: that gathering may take, about; None: any.
    """

    examples: int = 1000
    n: int = 32
    temperatures: tuple[float, ...] = (0.5, 0.7, 1.0)
    seconds: float | None = None


@dataclass
class Source:
    """A flow and its data.

    Args:
        open_split: returns "train", "val" or "test".
        weights: which the flow has, "ema" or "raw"; None: those that training chose.
        as_trained: whether the flow and the data are those that the run's summary is about.

    Attributes:
        example_seconds: that the likelihood of one example takes; 0 until it is known.
    """

    flow: Flow
    config: TrainConfig
    spec: DataSpec
    columns: Columns | None
    amounts: Amounts
    open_split: Callable[[str], Split]
    weights: str | None = None
    as_trained: bool = True
    example_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self.split = cache(lambda name: self.open_split(name).to(self.device))

    @property
    def device(self) -> torch.device:
        return next(self.flow.parameters()).device

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float("inf") if self.amounts.seconds is None else self.amounts.seconds - self.seconds

    def share(self, part: float) -> float:
        """Seconds that a part of the work may take: this share of the budget, or what is left."""
        return min(self.left, (self.amounts.seconds or float("inf")) * part)

    def draw(self, n: int, seconds: float, temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        """At most n samples, (m, *shape) on the CPU: as many as ``seconds`` allow.

        Raises:
            FlowtrainError: not even a few are affordable, or one is not finite.
        """
        slow = any(isinstance(layer, Autoregressive) and not inverted for layer, inverted in walk(self.flow.bijection))
        each = self.example_seconds * (self.flow.dimensions if slow else 1)  # of a sample alone, at most
        size, done = (1 if 4 * n * each > seconds else n), 0.0
        while True:
            if size * each > max(seconds - done, 0.2):
                raise FlowtrainError(f"a sample of this model takes {each:.2g} s, too long for this report's time")
            began = time.monotonic()
            given = None if context is None else context[:size]
            samples = draw_samples(self.flow, size, self.config.seed, given, temperature)
            took = time.monotonic() - began
            each, done = took / size, done + took
            larger = min(n, max(size, int((seconds - done) / each)), 8 * size)
            if larger == size or size < larger < min(n, 2 * size):
                return samples
            size = larger


@contextmanager
def attempt(material: Material, part: str) -> Iterator[None]:
    """Leave a part of the report out, with a sentence that says why, where the work inside fails."""
    try:
        yield
    except (FlowtrainError, ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
        material.leave_out(part, f"Left out: {str(error).strip().rstrip('.')}.")


def spread(total: int, count: int) -> torch.Tensor:
    """``count`` numbers below ``total``, evenly spaced; all where there are fewer."""
    count = min(count, total)
    return torch.arange(count) * total // max(1, count)
