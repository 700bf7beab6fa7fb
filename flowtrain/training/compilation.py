"""Whether a run compiles its flow: as ``compile`` says, as the run did before, or where a measured gain repays it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flowtrain.config.schema import TrainConfig
from flowtrain.data.batch import Batch
from flowtrain.engine.budget import Budget
from flowtrain.engine.compile_choice import CompileChoice
from flowtrain.engine.compile_gain import Gain, Known, fastest, measure
from flowtrain.engine.compiling import Compilation, compile_and_try, regions
from flowtrain.engine.objectives import Objective
from flowtrain.engine.precision import autocast_dtype
from flowtrain.engine.threads import halvings
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed
from flowtrain.training.background import BackgroundProcess, Job
from flowtrain.training.late_choice import LateChoice, RepeatedChoice

log = logging.getLogger("flowtrain")

LONG = 30 * 60  # seconds: a run that takes longer on a CPU tries at its start whether compiling pays
MANY = 2000  # steps: a run of fewer is not that long


def gradient_of(flow: Flow, objective: Objective, config: TrainConfig, batch: Batch) -> Callable[[], object]:
    """A function that computes a gradient on ``batch`` as a training step does."""
    autocast = autocast_dtype(config.precision, batch.x.device)
    training_pass = TrainingPass(flow, objective, config.seed, config.trainer.accumulate, autocast)

    def step() -> None:
        flow.train()
        flow.zero_grad()
        training_pass.backpropagate(batch, 0, distributed.rank(), distributed.world())

    return step


def choose_compilation(run, flow: Flow, config: TrainConfig, budget: Budget) -> CompileChoice:
    """Compile the flow of a :class:`flowtrain.training.setup.SetUp` where ``compile`` asks for it or where that pays.

    Raises:
        UsageError: compile=true, and it cannot be compiled.
    """
    auto, before = config.compile == "auto", run.before
    never = config.compile is False or auto and (config.deterministic or config.memory == "reversible")
    never = never or run.spec.target is not None  # which needs the layers' inverses
    never = never or not run.objective.runs_layers
    if never or auto and before.compiled is False:
        return CompileChoice(gain=before.gain)
    batch, whole = next(run.loader(config).batches()), config.memory == "none"
    step = gradient_of(flow, run.objective, config, batch)
    if not auto:
        with _without_trace(flow):
            return CompileChoice(compile_and_try(flow, step, whole))
    choice = _Choice(run, flow, config, budget, batch, step, whole)
    return choice.repeated() if before.compiled else choice.new()


class _Choice:
    """The choice of compile=auto.

    Attributes:
        may_wait: whether it may be made between two steps: where nothing else depends on how the flow is called.
    """

    def __init__(self, run, flow, config, budget, batch, step, whole):
        self.run, self.flow, self.config, self.budget, self.batch = run, flow, config, budget, batch
        self.step, self.whole = step, whole
        self.may_wait = run.device.type == "cpu" and distributed.world() == 1 and whole and not config.dry_run
        self.threads = threads_of(config, run.device)
        self.known = Known(
            flow, batch.chunk(config.trainer.accumulate)[0].x, *_setting(run.objective, config, self.threads)
        )
        self.begun = (run.state["step"], run.state["seconds"]) if run.state else (0, 0.0)

    def repeated(self) -> CompileChoice:
        since = self.run.before.since if self.may_wait else 0
        choice = RepeatedChoice(self.run.before.gain, since, self._compile)
        choice.after_step(*self.begun)
        return choice

    def new(self) -> CompileChoice:
        late = LateChoice(self.known, self.budget, self._compile, BackgroundProcess(self._job))
        if late.look(*self.begun):
            return late
        if not any(True for _ in regions(self.flow.bijection)):
            return CompileChoice()
        if self._is_long():
            return self._tried()
        return late if self.may_wait else CompileChoice()

    def _is_long(self) -> bool:
        """Whether trying it is worth the time: it takes minutes."""
        steps, minutes = self.budget.steps or math.inf, self.budget.minutes or math.inf
        if self.run.device.type == "cuda":
            return steps >= 5000 if self.budget.steps else minutes >= 20
        if self.config.dry_run or steps < MANY or 60 * minutes < LONG:
            return False
        with _without_trace(self.flow):
            each = distributed.broadcast_object(fastest(self.flow, self.step, self.threads))
        return self.budget.left(*self.begun, each) * each >= LONG

    def _tried(self) -> CompileChoice:
        """Compile the flow, and keep that if it gains."""
        compilation, gain, error = None, None, ""
        try:
            with _without_trace(self.flow):
                compilation, gain = measure(self.flow, self.step, self.whole, self.threads)
        except UsageError as failure:
            error = str(failure)
        gain, error = distributed.broadcast_object((gain, error)) if distributed.world() > 1 else (gain, error)
        failed = any(distributed.all_gather_object(compilation is None))
        if distributed.is_main():
            self.known.write(error if failed else gain)
        if failed:
            self._warn(compilation, error)
            return CompileChoice()
        log.info("compile=auto: %s", gain)
        if gain.compiled < gain.eager:
            return CompileChoice(compilation, gain, self.begun[0])
        compilation.undo()
        return CompileChoice(gain=gain)

    def _compile(self, gain: Gain | None) -> Compilation | None:
        """Compile the flow in place, with the number of threads of ``gain``; None, with a warning, where that fails."""
        began, threads, compilation, error = time.monotonic(), torch.get_num_threads(), None, ""
        if gain and gain.threads in self.threads:
            torch.set_num_threads(gain.threads)
        try:
            with _without_trace(self.flow):
                compilation = compile_and_try(self.flow, self.step, self.whole)
        except UsageError as failure:
            error = str(failure)
        if any(distributed.all_gather_object(compilation is None)):
            torch.set_num_threads(threads)
            return self._warn(compilation, error)
        if gain and distributed.is_main():
            self.known.note_compiling(gain, time.monotonic() - began)
        return compilation

    def _warn(self, compilation: Compilation | None, error: str) -> None:
        """Leave the flow as it was, since it cannot be compiled on every process."""
        if compilation:
            compilation.undo()
        log.warning("compile=auto: trains without: %s", error.removeprefix("compile=true: ") or "it fails elsewhere")

    def _job(self) -> Job:
        most = torch.get_num_threads()  # with which the run is fastest; its shorter compiled steps need no more
        threads = [number for number in self.threads if number <= most]
        return Job(self.config, self.run.spec, self.flow.state_dict(), self.batch, threads, self.known)


def threads_of(config: TrainConfig, device: torch.device) -> list[int]:
    """The numbers of threads to choose from: several in a process that trains alone on the CPU, unless ``threads`` or
    ``deterministic`` says otherwise."""
    most, alone = torch.get_num_threads(), device.type == "cpu" and distributed.world() == 1
    return halvings(most) if alone and config.threads == "auto" and not config.deterministic else [most]


def _setting(objective: Objective, config: TrainConfig, threads: list[int]) -> tuple:
    world = distributed.world()
    return type(objective).__name__, config.precision, config.memory, config.trainer.accumulate, world, threads


@contextmanager
def _without_trace(flow: Flow) -> Iterator[None]:
    """Gradients that are computed within it leave nothing behind: neither moments of batch normalization nor another
    state of torch's generator."""
    before = [buffer.clone() for buffer in flow.buffers()]
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(flow.buffers(), before):
                buffer.copy_(value)
        flow.zero_grad()
