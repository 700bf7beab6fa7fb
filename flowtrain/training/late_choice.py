"""Choices to compile that may fall between two steps of a run."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from flowtrain.engine.budget import Budget
from flowtrain.engine.compile_choice import CompileChoice
from flowtrain.engine.compile_gain import Gain, Known
from flowtrain.engine.compiling import Compilation
from flowtrain.runtime import distributed
from flowtrain.training.background import BackgroundProcess

log = logging.getLogger("flowtrain")

EVERY = 1.0  # seconds between two looks
COUNTED = 8  # latest steps, whose median says how long a run goes on
WORTH = 15.0  # seconds: for a run that takes no longer nothing is measured

Compile = Callable[[Gain | None], Compilation | None]  # None where it fails


class LateChoice(CompileChoice):
    """Compiles the flow as soon as it is known that this repays for the steps that are left: at the start of a run, or
    later, when a process beside it, its own or that of another run, has measured the gain.

    Args:
        process: measures the gain, once the run shows that it is long enough.
    """

    def __init__(self, known: Known, budget: Budget, compile: Compile, process: BackgroundProcess):
        super().__init__()
        self.known, self.budget, self.compile, self.process = known, budget, compile, process
        self.is_settled, self.next_look = False, 0.0
        self.times: deque[float] = deque(maxlen=COUNTED)

    def look(self, step: int = 0, seconds: float = 0.0) -> bool:
        """Choose, if the gain is known, in a run that has come to ``step`` after ``seconds``; whether it is."""
        found = distributed.broadcast_object(self.known.read())
        self.is_settled = found is not None
        if isinstance(found, str):
            log.info("compile=auto: not compiled: %s", found.removeprefix("compile=true: "))
        elif found:
            self.gain, repays = found, found.repays(self.budget, step, seconds)
            verdict, when = "compiled" if repays else "not compiled", f"after step {step}" if self.times else "before"
            log.info("compile=auto: %s: measured here %s, %s", verdict, when, found)
            self.compilation, self.since = (self.compile(found), step) if repays else (None, 0)
        return self.is_settled

    def after_step(self, step: int, seconds: float, took: float) -> None:
        if self.is_settled:
            return
        self.times.append(took)
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + EVERY
        if not self.look(step, seconds) and len(self.times) == COUNTED:
            each = median(self.times)
            if self.budget.left(step, seconds, each) * each >= WORTH:
                self.process.start()

    def state_dict(self) -> dict:
        return super().state_dict() | ({} if self.is_settled else {"open": True})

    def __exit__(self, failed, *_) -> None:
        self.process.leave(bool(failed))


class RepeatedChoice(CompileChoice):
    """Compiles the flow after as many steps as a run before had taken when it was compiled."""

    def __init__(self, gain: Gain | None, since: int, compile: Compile):
        super().__init__(None, gain, since)
        self.compile, self.is_settled = compile, False

    def after_step(self, step: int, seconds: float = 0.0, took: float = 0.0) -> None:
        if not self.is_settled and step >= self.since:
            self.is_settled = True
            log.info("compile=auto: compiled%s, as before", f" after step {step}" * (step == self.since > 0))
            self.compilation = self.compile(self.gain)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "compiled": self.compilation is not None or not self.is_settled}
