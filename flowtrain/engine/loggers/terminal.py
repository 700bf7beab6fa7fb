"""Where training stands, on the terminal."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack

from flowtrain.engine.loggers.logger import NullLogger, RunRecord

log = logging.getLogger("flowtrain")


def progress() -> ProgressLines:
    """A bar on a terminal, lines elsewhere."""
    return ProgressBar() if sys.stderr.isatty() else ProgressLines()


class ProgressLines(NullLogger):
    """Logs the objective's figure, the rate in examples a second and the time left."""

    def open(self, run):
        self.run: RunRecord = run

    def scalars(self, step, values):
        if f"train/{self.run.key}" in values:
            self.show(step, f"{values[f'train/{self.run.key}']:.4f} {self.run.unit}", self._rate(step, values))

    def show(self, step: int, figure: str, rate: str) -> None:
        log.info("step %d: %s, %s", step, figure, rate)

    def _rate(self, step: int, values: dict[str, float]) -> str:
        seconds = values["system/seconds"]
        spent = self.run.budget.spent(step, seconds)
        left = _clock(seconds * (1 - spent) / spent)
        return f"{values[f'system/{self.run.examples}_per_second']:.0f} {self.run.examples}/s, {left} left"


class ProgressBar(ProgressLines):
    """Shows the same in a bar, below the lines of the log."""

    def open(self, run):
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        super().open(run)
        self.bar = tqdm(total=run.budget.steps, initial=run.step, unit="step", dynamic_ncols=True, smoothing=0.05)
        self.redirection = ExitStack()
        self.redirection.enter_context(logging_redirect_tqdm())

    def show(self, step, figure, rate):
        self.bar.set_postfix_str(f"{figure}, {rate}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self):
        self.bar.close()
        self.redirection.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
