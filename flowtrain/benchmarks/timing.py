"""Timing of several variants of the same work in turns, and ratios that other work on the machine affects little."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_ROUNDS = 3  # however long they take
LONG = 20  # slices: how long a call takes that is not measured again to find how many fit into one


@dataclass(frozen=True)
class Spread:
    """The median over rounds, and half of their interquartile range."""

    median: float
    half_range: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], 0.0)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), (high - low) / 2)


Times = dict[str, list[float]]  # variant -> seconds a call, one number a round


def time_in_turns(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    order: random.Random,
    synchronize: Callable[[], None],
    slice: float = 0.1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time each of ``variants`` once a round, in a new random order each round.

    A first call, which does not count, warms up. A round calls a short variant repeatedly, for ``slice`` seconds. There
    are ``rounds`` rounds, or as many as start within ``seconds``, but at least three. ``synchronize`` waits until the
    device is idle. ``clock`` measures the calls, for instance in the process's CPU seconds; ``seconds`` are always
    wall-clock seconds.
    """
    calls = {}
    for name, run in variants.items():
        first = _time(run, 1, synchronize, clock)
        calls[name] = 1 if first > LONG * slice else max(1, math.ceil(slice / _time(run, 1, synchronize, clock)))
    times: Times = {name: [] for name in variants}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in order.sample(list(variants), len(variants)):
            times[name].append(_time(variants[name], calls[name], synchronize, clock))
    return times


def _time(run: Callable[[], object], calls: int, synchronize: Callable[[], None], clock: Callable[[], float]) -> float:
    synchronize()
    start = clock()
    for _ in range(calls):
        run()
    synchronize()
    return (clock() - start) / calls


def ratio(times: Times, ours: str, theirs: str) -> Spread:
    """The ratio of two variants' times, taken within each round, whose variants share the state of the machine."""
    return Spread.of([mine / other for mine, other in zip(times[ours], times[theirs], strict=True)])
