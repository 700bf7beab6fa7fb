"""Whether a run compiles its flow: as ``compile`` says, as the run did before, or where a measured gain repays it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from flowtrain.config.schema import TrainConfig
from flowtrain.data.batch import Batch
from flowtrain.engine.budget import Budget
from flowtrain.engine.compile_gain import Gain, Known, fastest, measure
from flowtrain.engine.compiling import Compilation, compile_and_try, regions
from flowtrain.engine.objectives import Objective
from flowtrain.engine.precision import autocast_dtype
from flowtrain.engine.threads import halvings
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed
from flowtrain.training.background import BackgroundTrial, Job

log = logging.getLogger("flowtrain")

LONG = 30 * 60  # seconds: a run that takes longer on a CPU tries at its start whether compiling pays
MANY = 2000  # steps: a run of fewer is not that long
PATIENCE = 0.5  # of the time that a run takes eagerly: so long it waits for a compilation that has begun


@dataclass(frozen=True)
class CompileChoice:
    """Attributes:
    compilation: of the flow, where it runs compiled.
    gain: the figures by which that was chosen, or None.
    trial: to be started where a run is long enough that a later one may gain.
    """

    compilation: Compilation | None = None
    gain: Gain | None = None
    trial: BackgroundTrial | None = None

    def state_dict(self) -> dict:
        """For a checkpoint: a resumed run repeats the choice."""
        return {"compiled": self.compilation is not None, "gain": self.gain and asdict(self.gain)}


def was_compiled(state: dict) -> bool | None:
    """What the checkpoint of a run says of it; None: nothing."""
    choice = state.get("compilation")
    compiled = choice.get("compiled") if isinstance(choice, dict) else None
    return compiled if isinstance(compiled, bool) else None


def _gain_before(run) -> Gain | None:
    """The figures by which a run that is resumed was left as it is."""
    try:
        return Gain(**run.state["compilation"]["gain"])
    except (KeyError, TypeError):
        return None


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
    auto = config.compile == "auto"
    never = config.compile is False or auto and (config.deterministic or config.memory == "reversible")
    never = never or run.spec.target is not None  # which needs the layers' inverses
    if never or auto and run.compiled is False:
        return CompileChoice(gain=_gain_before(run))
    batch, whole = next(run.loader(config).batches()), config.memory == "none"
    step = gradient_of(flow, run.objective, config, batch)
    with _buffers_kept(flow):
        if not auto:
            return CompileChoice(compile_and_try(flow, step, whole))
        known = Known(flow, batch.chunk(config.trainer.accumulate)[0].x, *_setting(run.objective, config))
        choice = _Choice(run, flow, config, budget, batch, step, known, whole)
        return choice.repeated() if run.compiled else choice.new()


class _Choice:
    """The choice of compile=auto."""

    def __init__(self, run, flow, config, budget, batch, step, known, whole):
        self.run, self.flow, self.config, self.budget, self.batch = run, flow, config, budget, batch
        self.step, self.known, self.whole = step, known, whole
        self.threads = threads_of(config, run.device)
        self.begun = (run.state["step"], run.state["seconds"]) if run.state else (0, 0.0)

    def repeated(self) -> CompileChoice:
        gain = _gain_before(self.run)
        threads = [*self.run.turns, *([gain.threads] if gain else [])]
        if threads and threads[0] <= self.threads[0]:
            torch.set_num_threads(threads[0])
        log.info("compile=auto: compiled, as before")
        return self._compiled(gain)

    def new(self) -> CompileChoice:
        found = self._found()
        if isinstance(found, str):
            log.info("compile=auto: not compiled: %s", found.removeprefix("compile=true: "))
            return CompileChoice()
        if found is not None:
            repays = found.repays(self.budget, *self.begun)
            log.info("compile=auto: %s: measured here before, %s", "compiled" if repays else "not compiled", found)
            if not repays:
                return CompileChoice(gain=found)
            torch.set_num_threads(found.threads)
            return self._compiled(found)
        if not any(True for _ in regions(self.flow.bijection)):
            return CompileChoice()
        if self._is_long():
            return self._tried()
        alone = self.run.device.type == "cpu" and distributed.world() == 1 and not self.config.dry_run
        return CompileChoice(trial=BackgroundTrial(self._job) if alone and self.whole else None)

    def _found(self) -> Gain | str | None:
        """What is known on the first process; the compilation of an earlier run is waited for."""
        if self.known.read() is None and self.known.is_being_measured() and not self.config.dry_run:
            limit = min(LONG, PATIENCE * self.budget.left(*self.begun, each := self._eager()) * each)
            if limit > 1:
                log.info("compile=auto: waits up to %.0f s for the compilation that another run has begun", limit)
            end = time.monotonic() + limit
            while self.known.is_being_measured() and time.monotonic() < end:
                time.sleep(0.1)
        return distributed.broadcast_object(self.known.read())

    def _eager(self) -> float:
        return distributed.broadcast_object(fastest(self.flow, self.step, self.threads))

    def _is_long(self) -> bool:
        """Whether trying it is worth the time: it takes minutes."""
        steps, minutes = self.budget.steps or math.inf, self.budget.minutes or math.inf
        if self.run.device.type == "cuda":
            return steps >= 5000 if self.budget.steps else minutes >= 20
        if self.config.dry_run or steps < MANY or 60 * minutes < LONG:
            return False
        return self.budget.left(*self.begun, each := self._eager()) * each >= LONG

    def _tried(self) -> CompileChoice:
        """Compile the flow, and keep that if it gains."""
        compilation, gain, error = None, None, ""
        try:
            compilation, gain = measure(self.flow, self.step, self.whole, self.threads)
        except UsageError as failure:
            error = str(failure)
        gain, error = distributed.broadcast_object((gain, error)) if distributed.world() > 1 else (gain, error)
        failed = any(distributed.all_gather_object(compilation is None))
        if distributed.is_main():
            self.known.write(error if failed else gain)
        if failed:
            return self._failed(compilation, error)
        log.info("compile=auto: %s", gain)
        if gain.compiled < gain.eager:
            return CompileChoice(compilation, gain)
        compilation.undo()
        return CompileChoice(gain=gain)

    def _compiled(self, gain: Gain | None) -> CompileChoice:
        began, compilation, error = time.monotonic(), None, ""
        try:
            compilation = compile_and_try(self.flow, self.step, self.whole)
        except UsageError as failure:
            error = str(failure)
        if any(distributed.all_gather_object(compilation is None)):
            return self._failed(compilation, error)
        if gain and distributed.is_main():
            self.known.note_compiling(gain, time.monotonic() - began)
        return CompileChoice(compilation, gain)

    def _failed(self, compilation: Compilation | None, error: str) -> CompileChoice:
        if compilation:
            compilation.undo()
        log.warning("compile=auto: trains without: %s", error.removeprefix("compile=true: ") or "it fails elsewhere")
        return CompileChoice()

    def _job(self) -> Job:
        weights = {name: tensor.cpu() for name, tensor in self.flow.state_dict().items()}
        return Job(self.config, self.run.spec, weights, self.batch, self.threads, self.known)


def threads_of(config: TrainConfig, device: torch.device) -> list[int]:
    """The numbers of threads to choose from: several in a process that trains alone on the CPU, unless ``threads`` or
    ``deterministic`` says otherwise."""
    most, alone = torch.get_num_threads(), device.type == "cpu" and distributed.world() == 1
    return halvings(most) if alone and config.threads == "auto" and not config.deterministic else [most]


def _setting(objective: Objective, config: TrainConfig) -> tuple:
    world, threads = distributed.world(), torch.get_num_threads()
    return type(objective).__name__, config.precision, config.memory, config.trainer.accumulate, world, threads


@contextmanager
def _buffers_kept(flow: Flow) -> Iterator[None]:
    """Gradients that are computed within it leave nothing behind, such as moments of batch normalization."""
    before = [buffer.clone() for buffer in flow.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(flow.buffers(), before):
                buffer.copy_(value)
        flow.zero_grad()
