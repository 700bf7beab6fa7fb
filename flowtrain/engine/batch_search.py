"""The batch size that suits a machine, found by measuring steps of several sizes.

Both searches call ``measure(size)``, which returns the seconds of a step and the bytes that it needs at once, and which
raises torch.OutOfMemoryError, or the error of one of CUDA's libraries, where there is not enough memory. They return
the size and what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from flowtrain.engine.out_of_memory import is_out_of_memory

GAIN = 1.1  # a doubling that makes training faster by less than this factor is not worth its larger batch
START = 16  # examples

Measure = Callable[[int], tuple[float, int]]


class Trial(NamedTuple):
    """A size that was measured."""

    size: int
    seconds: float
    bytes: int

    @property
    def rate(self) -> float:
        """Examples a second."""
        return self.size / self.seconds


def sizes_between(least: int, most: int, share: int) -> list[int]:
    """``share``, a number of examples that processes can share out, times powers of two.

    >>> sizes_between(16, 100, 1), sizes_between(16, 100, 3), sizes_between(16, 8, 1)
    ([16, 32, 64], [24, 48, 96], [])
    """
    sizes = [share]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    return [size for size in sizes if least <= size <= most]


def knee(
    measure: Measure, sizes: list[int], room: float, seconds: float, clock: Callable[[], float] = time.monotonic
) -> tuple[int, list[Trial]]:
    """The smallest of ``sizes``, which double, with nearly the best throughput: no larger one that was measured is
    faster by the factor GAIN. For a CPU.

    Two doublings in a row without such a gain end the search; so does a size whose step would need more than ``room``
    bytes, or would take the search beyond ``seconds`` in all.
    """
    trials: list[Trial] = []
    times = [clock()]
    for size in sizes:
        if trials:
            spent, last = times[-1] - times[0], times[-1] - times[-2]  # the next takes about twice as long as the last
            if spent + 2 * last > seconds or 2 * trials[-1].bytes > room:
                break
        trials.append(Trial(size, *measure(size)))
        times.append(clock())
        if len(trials) > 2 and max(trials[-1].rate, trials[-2].rate) < GAIN * trials[-3].rate:
            break
    best = max(trial.rate for trial in trials)
    return next(trial.size for trial in trials if trial.rate * GAIN >= best), trials


def largest_that_fits(measure: Measure, sizes: list[int], room: float) -> tuple[int, list[Trial]]:
    """The largest of ``sizes`` whose step needs at most ``room`` bytes. For a GPU.

    The bytes of two sizes give a straight line. The largest size that it allows is measured too, and a smaller one
    after each that does not fit.

    Raises:
        torch.OutOfMemoryError: not even the smallest fits.
    """
    trials: dict[int, Trial] = {}
    tried: set[int] = set()

    def fits(size: int) -> bool:
        if size not in tried:
            tried.add(size)
            try:
                trials[size] = Trial(size, *measure(size))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        return size in trials and trials[size].bytes <= room

    first = next((i for i, size in enumerate(sizes) if size >= START), len(sizes) - 1)
    while not fits(sizes[first]):
        if first == 0:
            raise torch.OutOfMemoryError(f"a step with {sizes[0]} examples does not fit")
        first -= 1
    allowed = sizes[first:]
    if len(allowed) > 1 and fits(allowed[1]):
        one, two = trials[allowed[0]], trials[allowed[1]]
        slope = max(0.0, (two.bytes - one.bytes) / (two.size - one.size))
        allowed = [size for size in allowed if two.bytes + slope * (size - two.size) <= room]
    else:
        allowed = allowed[:1]
    size = next(size for size in reversed(allowed) if fits(size))
    return size, [trials[size] for size in sorted(trials)]
