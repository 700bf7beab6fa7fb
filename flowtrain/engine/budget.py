"""How long a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """A number of training steps, of minutes, or both, whichever is spent first."""

    steps: int | None
    minutes: float | None

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget that is spent, 0 to 1."""
        of_steps = step / self.steps if self.steps else 0.0
        of_minutes = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(of_steps, of_minutes))

    def left(self, step: int, seconds: float, each: float) -> float:
        """The number of steps that are left after ``step`` and ``seconds``, if each takes ``each`` seconds."""
        of_steps = self.steps - step if self.steps else math.inf
        of_minutes = (60 * self.minutes - seconds) / each if self.minutes else math.inf
        return max(0, min(of_steps, of_minutes))

    def __str__(self) -> str:
        limits = (self.steps and f"step {self.steps}", self.minutes and f"{self.minutes:g} minutes")
        return " or ".join(filter(None, limits))
