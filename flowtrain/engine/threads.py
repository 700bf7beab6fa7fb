"""The number of torch's threads on a CPU that training steps are fastest with, measured on the first of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import median

import torch

from flowtrain.engine.state import Stateful

log = logging.getLogger("flowtrain")

ROUNDS, KEPT = 3, 3  # turns of each number; the steps of a turn that count, after one that does not
LEAST = 0.05  # seconds that a number's turns in a row take: where steps are quick, it has several
SLOW = 1.5  # a number with which steps take this many times as long as with the best gets no more turns


def halvings(most: int) -> list[int]:
    """``most``, its half, its quarter … and 1.

    >>> halvings(6)
    [6, 3, 1]
    """
    return [most] if most == 1 else [most, *halvings(most // 2)]


class Threads(Stateful):
    """Gives each of several numbers of threads its turns among the first steps of a run, then keeps the fastest.

    These are the steps of the run, and no others are computed. Where fewer threads are slower, one turn with the second
    number shows it. A run that is resumed keeps the number that was chosen.

    Args:
        numbers: of threads, the largest first. A single one is kept.
        use: sets the number of threads.

    Attributes:
        chosen: the number to keep; None until that is known.
        turns: the numbers in the order of their turns, the present one included.
    """

    STATE = ("chosen", "round", "waiting", "steps", "elapsed", "seconds", "turns")

    def __init__(self, numbers: list[int], use: Callable[[int], object] = torch.set_num_threads):
        self.numbers, self.use = numbers, use
        self.chosen = numbers[0] if len(numbers) == 1 else None
        self.round, self.waiting = 0, list(numbers)
        self.steps, self.elapsed = 0, 0.0  # steps of the turn of the first that waits, and the seconds of its turns
        self.seconds: dict[int, list[float]] = {number: [] for number in numbers}  # of the numbers in question
        self.turns = [numbers[0]]

    def start(self) -> None:
        """To be called before the first step."""
        self.use(self.chosen or self.waiting[0])

    def after_step(self, seconds: float) -> None:
        """To be called with the duration of each step."""
        if self.chosen:
            return
        if self.steps:
            self.seconds[self.waiting[0]].append(seconds)
        self.steps, self.elapsed = self.steps + 1, self.elapsed + seconds
        if self.steps > KEPT:
            self.steps = 0
            if self.elapsed >= LEAST:
                self._next()
            self.turns.append(self.chosen or self.waiting[0])
            self.use(self.turns[-1])

    def _next(self) -> None:
        """Go on to the next number, or choose."""
        number, self.elapsed = self.waiting.pop(0), 0.0
        typical = {one: median(times) for one, times in self.seconds.items() if times}
        limit = SLOW * min(typical.values())
        if self.waiting and typical[number] <= limit:
            return
        self.waiting = [one for one in typical if typical[one] <= limit]  # without those that had no turn
        self.seconds = {one: self.seconds[one] for one in self.waiting}
        self.round += 1
        if self.round == ROUNDS or len(self.waiting) == 1:
            self.chosen = min(self.waiting, key=typical.get)
            took = ", ".join(f"{1000 * typical[one]:.1f} ms with {one}" for one in typical)
            log.info("threads: %d from now on; a step took %s (threads=N sets it)", self.chosen, took)

    def load_state_dict(self, state: dict) -> None:
        """Continue where the run was; a single number is kept, and what the turns were is remembered."""
        if len(self.numbers) == 1:
            self.turns = state.get("turns") or self.turns
        else:
            super().load_state_dict({"turns": [], "elapsed": 0.0} | state)  # older files do not know them
            self.chosen = self.chosen and min(self.chosen, self.numbers[0])


class RepeatedThreads(Threads):
    """Gives numbers of threads the turns that they had in another run, so that every step has the same number."""

    def __init__(self, turns: list[int], use: Callable[[int], object] = torch.set_num_threads):
        super().__init__(turns[:1], use)
        self.left, self.numbers = turns[1:], sorted({*turns}, reverse=True)

    def after_step(self, seconds: float) -> None:
        self.steps += 1
        if self.steps % (1 + KEPT) == 0 and self.left:
            self.chosen = self.left.pop(0)
            self.turns.append(self.chosen)
            self.use(self.chosen)
