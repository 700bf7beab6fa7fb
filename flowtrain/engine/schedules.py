"""Learning-rate schedules: factors of the optimizer's rate. Everything in ``__all__`` can be named in YAML.

A schedule is called with ``progress``, the share of the run's budget (steps or minutes) that is spent, 0 to 1, and
``step``. It has no state: a resumed run needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Constant", "Cosine", "Exponential", "Linear", "Steps"]


@dataclass(frozen=True)
class Constant:
    def __call__(self, progress: float, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear:
    """A line from 1 to ``floor``, after the first ``flat`` of the budget at 1."""

    floor: float = 0.0
    flat: float = 0.0

    def __post_init__(self):
        if not (0 <= self.floor <= 1 and 0 <= self.flat < 1):
            raise ValueError(f"floor={self.floor} and flat={self.flat} must lie between 0 and 1")

    def __call__(self, progress: float, step: int) -> float:
        return 1 - (1 - self.floor) * min(1.0, max(0.0, (progress - self.flat) / (1 - self.flat)))


@dataclass(frozen=True)
class Cosine(Linear):
    """The same with half a cosine in place of the line (Loshchilov & Hutter 2017)."""

    def __call__(self, progress: float, step: int) -> float:
        line = (super().__call__(progress, step) - self.floor) / (1 - self.floor or 1)
        return self.floor + (1 - self.floor) * 0.5 * (1 - math.cos(math.pi * line))


@dataclass(frozen=True)
class Exponential:
    """Times ``factor`` every ``every`` steps, continuously."""

    factor: float = 0.99
    every: int = 1000

    def __post_init__(self):
        if not (self.factor > 0 and self.every >= 1):
            raise ValueError(f"factor={self.factor} must be positive and every={self.every} at least 1")

    def __call__(self, progress: float, step: int) -> float:
        return self.factor ** (step / self.every)


@dataclass(frozen=True)
class WarmUp:
    """``schedule``, times a line from 0 to 1 over the first ``steps`` steps."""

    schedule: Callable[[float, int], float]
    steps: int

    def __call__(self, progress: float, step: int) -> float:
        warm = min(1.0, (step + 1) / self.steps) if self.steps else 1.0
        return warm * self.schedule(progress, step)


@dataclass(frozen=True)
class Steps:
    """Times ``factor`` at each of ``at``, shares of the budget."""

    at: tuple = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self):
        if not (self.factor > 0 and all(0 <= mark <= 1 for mark in self.at)):
            raise ValueError(f"factor={self.factor} must be positive and at={list(self.at)} lie between 0 and 1")

    def __call__(self, progress: float, step: int) -> float:
        return self.factor ** sum(progress >= mark for mark in self.at)
