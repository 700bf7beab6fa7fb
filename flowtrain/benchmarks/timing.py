"""Times of several variants of the same work, taken in turns, and ratios that outlive a machine's moods."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

LEAST_ROUNDS = 3  # however long they take


@dataclass(frozen=True)
class Spread:
    """A median over rounds, and half of the distance between their quartiles."""

    median: float
    half_range: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], 0.0)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), (high - low) / 2)


Times = dict[str, list[float]]  # of each variant: seconds a call, one number a round


def in_turns(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    order: random.Random,
    wait: Callable[[], None],
    slice: float = 0.1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time each of ``variants`` once a round, all in an order of its own each round.

    What is short is called so often in a round that this takes ``slice`` seconds. There are ``rounds`` rounds, or as
    many as begin within ``seconds``, but at least three. ``wait`` returns when the device has done what it was given.
    A first call, not counted, warms up. ``clock`` is what the times are read from, such as that of the process's own
    CPU seconds; the rounds' budget is always of the wall's.
    """
    calls = {}
    for name, run in variants.items():
        run()
        calls[name] = max(1, math.ceil(slice / _time(run, 1, wait, clock)))
    times: Times = {name: [] for name in variants}
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for name in order.sample(list(variants), len(variants)):
            times[name].append(_time(variants[name], calls[name], wait, clock))
    return times


def _time(run: Callable[[], object], calls: int, wait: Callable[[], None], clock: Callable[[], float]) -> float:
    wait()
    start = clock()
    for _ in range(calls):
        run()
    wait()
    return (clock() - start) / calls


def ratio(times: Times, ours: str, theirs: str) -> Spread:
    """The ratio of two variants' times: of each round by itself, since a round's variants share the machine's state."""
    return Spread.of([mine / other for mine, other in zip(times[ours], times[theirs], strict=True)])
