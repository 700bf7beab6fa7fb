"""Where training stands, on the terminal, in a log file and in a notebook."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack, suppress

from flowtrain.engine.loggers.logger import NullLogger, RunRecord

log = logging.getLogger("flowtrain")

PARTS, SECONDS = 20, 60.0  # of the budget, each with a line in a log file; after which there is one in any case
LEAST = 10  # characters of a bar that is worth its place


def progress() -> ProgressLines:
    """A bar on a terminal and in a notebook, lines elsewhere."""
    return ProgressBar() if sys.stderr.isatty() or _in_notebook() else ProgressLines()


class ProgressLines(NullLogger):
    """Logs the objective's figure, the rate in examples a second and the time left: of the first report, then after
    each twentieth of the budget, or minute if that is less, and of the last report."""

    def open(self, run):
        self.run: RunRecord = run
        self.logged = -1, 0.0  # the part of the budget and the seconds of the last line

    def scalars(self, step, values):
        key = f"train/{self.run.train_key or self.run.key}"
        if key not in values:
            return
        seconds = values["system/seconds"]
        spent = self.run.budget.spent(step, seconds)
        figure = f"{values[key]:.4f} {self.run.train_unit or self.run.unit}"
        rate = f"{values[f'system/{self.run.examples}_per_second']:.0f} {self.run.examples}/s"
        self.show(step, spent, seconds, figure, rate, f"{_clock(seconds * (1 - spent) / spent)} left")

    def show(self, step: int, spent: float, seconds: float, figure: str, rate: str, left: str) -> None:
        part, since = self.logged
        now = int(spent * PARTS + 1e-9)
        if now > part or seconds - since >= SECONDS:
            self.logged = now, seconds
            log.info("step %d: %s, %s, %s", step, figure, rate, left)


class ProgressBar(ProgressLines):
    """Shows the same in one line below those of the log, never wider than the terminal: on a narrow one, the bar goes
    first, then the rate, then the number of the step."""

    def open(self, run):
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        super().open(run)
        self.bar = tqdm(total=1.0, bar_format="{desc}", ncols=_width(), desc="starts", file=sys.stderr)
        self.redirection = ExitStack()
        self.redirection.enter_context(logging_redirect_tqdm())

    def show(self, step, spent, seconds, figure, rate, left):
        steps = f"{step}/{self.run.budget.steps}" if self.run.budget.steps else f"{step} steps"
        self.bar.ncols = _width()
        self.bar.set_description_str(fit(spent, steps, figure, rate, left, self.bar.ncols))

    def close(self):
        self.bar.close()
        self.redirection.close()


def fit(spent: float, steps: str, figure: str, rate: str, left: str, width: int) -> str:
    """The richest line of at most ``width`` characters.

    >>> fit(0.5, "750/1500", "2.5000 bits/dim", "3200 images/s", "1:30 left", 72)
    ' 50% ━━━━━━━─────── 750/1500, 2.5000 bits/dim, 3200 images/s, 1:30 left'
    >>> fit(0.5, "750/1500", "2.5000 bits/dim", "3200 images/s", "1:30 left", 36)
    ' 50% 2.5000 bits/dim, 1:30 left'
    """
    share = f"{100 * spent:3.0f}%"
    text = ", ".join((steps, figure, rate, left))
    if (room := width - len(share) - len(text) - 2) >= LEAST:
        done = round(spent * room)
        return f"{share} {'━' * done}{'─' * (room - done)} {text}"
    choices = ((share, text), (share, f"{figure}, {rate}, {left}"), (share, f"{figure}, {left}"), (figure, left))
    lines = [" ".join(each) for each in choices] + [figure]
    return next((line for line in lines if len(line) <= width), figure[:width])


def _width() -> int:
    """Characters in a line of the terminal, but for its last one, which some terminals wrap at; 79 in a notebook."""
    with suppress(OSError, ValueError, AttributeError):
        return max(1, (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1)
    return 79


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose stderr shows a line that is written over."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
