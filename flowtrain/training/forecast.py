"""How long a run will take, from what its parts take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowtrain.engine.trainer import Trainer


@dataclass(frozen=True)
class Prices:
    """Seconds of a training step, a validation, an image of samples, a checkpoint, and the evaluation at the end."""

    step: float
    validation: float
    preview: float
    checkpoint: float
    conclusion: float


@dataclass(frozen=True)
class Forecast:
    """Attributes:
    steps: that are still to be taken.
    validations, previews, checkpoints: on the way and at the end; with each validation the best weights are saved.
    seconds: of all that.
    """

    steps: int
    validations: int
    previews: int
    checkpoints: int
    seconds: float


def forecast(trainer: Trainer, step: int, seconds: float, price: Prices) -> Forecast:
    """What is left of a run after ``step`` and ``seconds`` of it, until its budget of steps or of minutes is spent."""
    budget = trainer.budget
    most = max(0, budget.steps - step) if budget.steps else math.inf
    if budget.minutes:  # which end the steps; the last validation and image come after them
        left = max(0.0, 60 * budget.minutes - seconds)
        low, high = 0, int(min(most, left / price.step + 1))
        while low < high:  # the most steps whose seconds, intervals included, are less than those left
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _on_the_way(trainer, step, price, middle)[-1] <= left else (low, middle - 1)
        most = min(most, low + 1)
    steps = int(most)
    validations, previews, checkpoints, seconds = _on_the_way(trainer, step, price, steps)
    end = step + steps
    keys = trainer.config.trainer
    last_validation, last_preview = _is_between(end, keys.val_every), _is_between(end, keys.sample_every)
    seconds += last_validation * (price.validation + price.checkpoint) + last_preview * price.preview
    seconds += price.checkpoint + price.conclusion
    return Forecast(steps, validations + last_validation, previews + last_preview, checkpoints + 1, seconds)


def _on_the_way(trainer: Trainer, start: int, price: Prices, steps: int) -> tuple[int, int, int, float]:
    """Validations, previews, checkpoints and seconds of ``steps`` steps after ``start``."""
    keys = trainer.config.trainer
    validations, previews, checkpoints = (
        (start + steps) // every - start // every if every else 0
        for every in (keys.val_every, keys.sample_every, keys.save_every)
    )
    seconds = steps * price.step + validations * (price.validation + price.checkpoint) + previews * price.preview
    seconds += checkpoints * price.checkpoint
    saves = int(seconds // (60 * keys.save_minutes))  # at the latest so often
    return validations, previews, max(checkpoints, saves), seconds + max(0, saves - checkpoints) * price.checkpoint


def _is_between(step: int, every: int | None) -> bool:
    """Whether ``step`` is not one at which something happens every so many steps."""
    return not every or step % every != 0


def clock(seconds: float) -> str:
    """Seconds as people say them.

    >>> [clock(seconds) for seconds in (0.0123, 2.5, 59, 3661, 200_000, 1e6)]
    ['12 ms', '2.5 s', '59 s', '1 h 01 min', '55 h 33 min', '11.6 days']
    """
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    if seconds < 4 * 86400:
        minutes = int(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{seconds / 86400:.1f} days"


def size(number: float) -> str:
    """Bytes as people say them.

    >>> size(900), size(3.5e6), size(2**31)
    ('0.9 KiB', '3.3 MiB', '2.0 GiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if number >= 2**power:
            return f"{number / 2**power:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"
