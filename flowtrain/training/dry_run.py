"""``dry_run=true``: what a run would be and cost, from its first steps, which are then forgotten."""

from __future__ import annotations

import copy
import gc
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.commands.previews import CELLS
from flowtrain.config.schema import TrainConfig, check_batch_size
from flowtrain.engine.auto import choose_batch_size
from flowtrain.engine.batch_search import START, sizes_between
from flowtrain.engine.loggers import Loggers, ProgressLines
from flowtrain.engine.out_of_memory import is_out_of_memory
from flowtrain.engine.precision import tf32_as
from flowtrain.engine.rehearsal import Cost, Rehearsal, free_bytes, kept_bytes
from flowtrain.engine.trainer import Trainer
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed
from flowtrain.training.errors import one_line_errors
from flowtrain.training.forecast import Forecast, Prices, clock, forecast, size
from flowtrain.training.introduction import log_description
from flowtrain.training.setup import SetUp, record_of
from flowtrain.training.start import average_of
from flowtrain.training.tree import model_tree

log = logging.getLogger("flowtrain")

STEPS = 1.0  # seconds of steps of the run itself
SLOW = 4.0  # seconds: a step that would take longer is not taken, but extrapolated from smaller batches
FLAT = 1.5  # a batch that takes less than so many times as long as the smallest says nothing of larger ones
HEAVY = 0.4  # seconds of a step of a few examples, after which no larger batch is tried
LONG = 20.0  # seconds that a step of the next larger batch may take
OTHERS, EACH = 8.0, 0.25  # seconds in which other settings are measured, all together; of the steps that count, of one
VALIDATION = 2.0  # seconds; of a validation that would take longer, some examples are evaluated
LARGE = 2**28  # bytes; a checkpoint that would be larger is not written
POINTS = 200  # of the schedule, that are computed


@dataclass(frozen=True)
class Measured:
    """Attributes:
    cost: of a step of the run.
    threads: with which it was measured.
    sizes: of the smaller batches that were computed, where the cost is extrapolated; else ().
    """

    cost: Cost
    threads: int
    sizes: tuple[int, ...] = ()


def main(run: SetUp) -> dict:
    """Print the model, the data and what the run would cost; returns the figures, on every process."""
    few = replace(run.config.trainer, init_batch=min(run.config.trainer.init_batch or run.config.batch_size, START))
    trainer = replace(run, config=replace(run.config, trainer=few)).ready_trainer()
    if distributed.is_main():
        log.info("dry run: nothing is kept; the same command without dry_run=true trains")
        log_description(run, trainer)
        _log_lines(["", *model_tree(trainer.flow), ""])
    _check_schedule(trainer)
    begun = trainer.step, trainer.seconds
    with one_line_errors(run.config, trainer, run.device):
        _check_loggers(run, trainer)
        measured = _measure(run, trainer)
        prices, bytes_of_checkpoint = _prices(run, trainer, measured)
        expected = forecast(trainer, *begun, prices)
        if distributed.is_main():
            _log_lines(_costs(run, trainer, measured, prices, expected, bytes_of_checkpoint))
        others = _Others(run, trainer, measured).rows()
        if distributed.is_main():
            _log_lines(["", *others])
    return {
        "seconds_per_step": prices.step,
        "peak_bytes": measured.cost.bytes,
        "steps": expected.steps,
        "seconds": round(expected.seconds, 3),
        "batch_size": run.config.batch_size,
        "threads": measured.threads,
        "disk_bytes": 3 * bytes_of_checkpoint,
    }


def _log_lines(lines: list[str]) -> None:
    for line in lines:
        log.info("%s", line)


# ---- what could go wrong later


def _check_schedule(trainer: Trainer) -> None:
    """Raise UsageError for a schedule that fails at some step of the run, or has no finite factor there."""
    last = trainer.budget.steps or 100_000
    for point in range(POINTS + 1):
        share, step = point / POINTS, round(last * point / POINTS)
        try:
            factor = float(trainer.schedule(share, step))
        except Exception as error:  # of a user's own class
            raise UsageError(f"scheduler: fails at step {step}: {type(error).__name__}: {error}") from error
        if not math.isfinite(factor):
            raise UsageError(
                f"scheduler: the factor of the rate at step {step} is {factor}; it must be a finite number"
            )


def _check_loggers(run: SetUp, trainer: Trainer) -> None:
    """Open every logger that writes into the run directory, here a temporary one, and close it."""
    loggers = Loggers(
        logger
        for logger in run.loggers.loggers
        if not isinstance(logger, ProgressLines) and not getattr(logger, "writes_elsewhere", False)
    )
    try:
        loggers.open(record_of(run, trainer))
    finally:
        loggers.close()


# ---- measuring


def _measure(run: SetUp, trainer: Trainer) -> Measured:
    """A step of the run; where it takes long, extrapolated from two smaller batches by a straight line."""
    if not trainer.compilation and (measured := _measure_smaller(run, trainer)):
        return measured
    rehearsal = Rehearsal(trainer)
    threads = rehearsal.choose_threads()
    return Measured(rehearsal.cost(STEPS, least=2, most=50), threads)


def _measure_smaller(run: SetUp, trainer: Trainer) -> Measured | None:
    """A step of the run, extrapolated; None where it is fast enough to be taken, or its batch is small."""
    batch = trainer.config.batch_size
    sizes = sizes_between(1, batch // 2, distributed.world() * trainer.config.trainer.accumulate)
    upper = next((i for i, size in enumerate(sizes) if size >= START), 0)
    if not upper:
        return None
    few = sizes[max(0, upper - 2)]
    small = _rehearsal(run, trainer, few)
    first = small.step()
    if first * batch / few <= SLOW:
        return None
    if first < HEAVY:
        small.choose_threads()
    fewest = min(first, *small.times(seconds=0.5, least=1, most=3))
    if fewest > HEAVY and few > sizes[0]:  # so slow that smaller ones have to do
        single = _rehearsal(run, trainer, sizes[0])
        costs = Cost((min(single.step(), single.step()),), single.peak()), Cost((fewest,), small.peak())
        return _extrapolated(*costs, (sizes[0], few), batch)
    for more in sizes[upper::2]:  # larger batches tell more
        rehearsal = _rehearsal(run, trainer, more)
        seconds = min(rehearsal.step(), rehearsal.step())
        if seconds * batch / more <= SLOW:
            return None
        if seconds > FLAT * fewest or 4 * seconds > LONG:
            costs = Cost((fewest,), small.peak()), Cost((seconds,), rehearsal.peak())
            return _extrapolated(*costs, (few, more), batch)
    return None


def _extrapolated(one: Cost, two: Cost, sizes: tuple[int, int], batch: int) -> Measured:
    """A step with ``batch`` examples, by a straight line through two smaller sizes."""
    beyond = (batch - sizes[1]) / (sizes[1] - sizes[0])
    seconds = two.seconds + max(0.0, two.seconds - one.seconds) * beyond
    cost = Cost((seconds,), round(two.bytes + max(0, two.bytes - one.bytes) * beyond))
    return Measured(cost, torch.get_num_threads(), sizes)


def _rehearsal(run: SetUp, trainer: Trainer, batch: int) -> Rehearsal:
    return Rehearsal(_other_trainer(run, trainer.flow, replace(trainer.config, batch_size=batch)))


def _other_trainer(run: SetUp, flow: Flow, config: TrainConfig) -> Trainer:
    """A Trainer of the same flow; of a copy, where the first Trainer has hooks that synchronize its gradients."""
    gc.collect()
    flow = copy.deepcopy(flow) if distributed.world() > 1 else flow
    return run.trainer(flow, config, ema=average_of(flow, config))


def _prices(run: SetUp, trainer: Trainer, measured: Measured) -> tuple[Prices, int]:
    """What the parts of the run take, and the bytes of a checkpoint."""
    step = max(measured.cost.seconds, _reading(run))
    with trainer.pause_compilation():
        validation, conclusion = _validation(run, trainer, step)
        preview = distributed.broadcast_object(_preview(run, trainer, conclusion / len(run.val)))
    checkpoint, bytes_of_checkpoint = distributed.broadcast_object(_checkpoint(trainer))
    return Prices(step, validation, preview, checkpoint, conclusion), bytes_of_checkpoint


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return distributed.broadcast_object(time.perf_counter() - began)


def _reading(run: SetUp) -> float:
    """Seconds that a batch takes to be read, by workers that do nothing else; 0 for data in memory."""
    if not run.train.streams:
        return 0.0
    batches = run.loader(run.config).batches()
    next(batches)
    ahead = 2 * run.config.trainer.workers  # what workers may have read by then
    return _seconds(lambda: [next(batches) for _ in range(ahead + 2)]) / (ahead + 2)


def _validation(run: SetUp, trainer: Trainer, step: float) -> tuple[float, float]:
    """Seconds of a validation while training, and of the one at the end. Raises FlowtrainError where it fails."""
    keys, every = trainer.config.trainer, len(run.val)
    usual = min(keys.val_examples or every, every)
    rate = trainer.loader.batch_size / step / keys.val_draws
    few = min(usual, max(1, round(rate * VALIDATION)))
    evaluate = trainer.validation.evaluate
    seconds = _seconds(lambda: evaluate(trainer.weights.average, few))
    if seconds < VALIDATION / 4:  # the first is slower
        seconds = _seconds(lambda: evaluate(trainer.weights.average, few))
    return seconds * usual / few, seconds * every / few


def _preview(run: SetUp, trainer: Trainer, example: float) -> float:
    """Seconds of an image, on the first process, 0 where a run draws none; a density that takes long is estimated from
    ``example``, the seconds of a likelihood."""
    if not distributed.is_main():
        return 0.0
    flow = trainer.weights.average
    try:
        if not run.spec.is_image and flow.dimensions <= 2 and CELLS**2 * example > VALIDATION:
            return CELLS**2 * example
        if run.spec.is_image:  # one first: sampling may take a pass for each dimension, whatever the number
            count, run.preview.count = run.preview.count, 1
            seconds = _alone(lambda: run.preview(flow))
            run.preview.count = count
            if seconds > VALIDATION / 2:
                return seconds
        began = time.perf_counter()
        return 0.0 if run.preview(flow) is None else time.perf_counter() - began
    except FloatingPointError as error:
        log.warning("no image of samples yet: %s", error)
        return 0.0


def _alone(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _checkpoint(trainer: Trainer) -> tuple[float, int]:
    """Seconds and bytes of a checkpoint; a large one is not written."""
    weights = kept_bytes(trainer)
    if weights > LARGE or not distributed.is_main():
        return weights / 2**28, weights
    seconds = _alone(trainer.save)
    return seconds, trainer.checkpoints.last.stat().st_size


# ---- what to say


def _costs(
    run: SetUp, trainer: Trainer, measured: Measured, prices: Prices, expected: Forecast, checkpoint: int
) -> list[str]:
    cost, batch, world = measured.cost, trainer.loader.batch_size, distributed.world()
    how = f"the median of {len(cost.times)}"
    if measured.sizes:
        how = f"extrapolated from batches of {' and '.join(map(str, measured.sizes))}"
    keys = trainer.config.trainer
    lines = [
        f"a step: {clock(prices.step)}, {_rate(batch / prices.step)} examples/s "
        f"({how}, {_count(measured.threads, 'thread')})",
        f"peak memory: {size(cost.bytes)} of tensors{' on each device' if world > 1 else ''} (weights, their average, "
        "optimizer, gradients, activations)"
        + ("" if run.device.type == "cuda" else f"; the process so far {size(_resident())}"),
        f"a validation: {clock(prices.validation)}; "
        + (f"an image: {clock(prices.preview)}; " if prices.preview else "")
        + f"a checkpoint: {clock(prices.checkpoint)}, {size(checkpoint)}, of which a run keeps three",
    ]
    if prices.step > cost.seconds:
        lines.append(f"reading the data is slower than a step, {clock(cost.seconds)}: trainer.workers=N may help")
    images = f"{_count(expected.previews, 'image')} {clock(expected.previews * prices.preview)}"
    counts = [
        f"{_count(expected.steps, 'step')} {clock(expected.steps * prices.step)}",
        f"{_count(expected.validations, 'validation')} {clock(expected.validations * prices.validation)}",
        *([images] if prices.preview else []),
        _count(expected.checkpoints, "checkpoint"),
        f"the last evaluation {clock(prices.conclusion)}",
    ]
    number = expected.seconds / 3600
    hours = f" ({number:,.0f} hours)" if number >= 10 else f" ({number:.2g} hours)" if number >= 1 / 60 else ""
    lines.append(f"until {trainer.budget}: about {clock(expected.seconds)}{hours}: {', '.join(counts)}")
    if keys.patience:
        lines.append(f"trainer.patience={keys.patience} may end it earlier")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _resident() -> int:
    """The most bytes that this process has had in memory."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


class _Others:
    """A table of what other settings would change, each measured by a few steps, as far as there is time."""

    def __init__(self, run: SetUp, trainer: Trainer, measured: Measured):
        self.run, self.trainer, self.measured = run, trainer, measured
        self.config: TrainConfig = trainer.config
        self.left = OTHERS

    def rows(self) -> list[str]:
        cost, found = self.measured.cost, []
        found.append(("as it is", self._figures(cost, self.config.batch_size)))
        compiled = self.trainer.compilation is not None
        if self.config.compile == "auto" and not compiled and self.run.spec.target is None:
            found.append(("compile=true", self._compiled_before()))
        with self.trainer.pause_compilation():
            for words, change, slower in self._changes(compiled):
                found.append((words, self._try(change, slower)))
        width = max(len(words) for words, _ in found)
        head = f"{'what would change':{max(width, 17)}}  a step     examples/s  peak memory"
        return [head, *(f"{words:{max(width, 17)}}  {text}" for words, text in found)]

    def _changes(self, compiled: bool) -> Iterator[tuple[str, dict, float]]:
        """The words, the changed keys, and how many times as long a step may take."""
        if compiled:
            yield "compile=false", {"compile": False}, 2.0
        for memory in MEMORY_MODES:
            if memory != self.config.memory:
                yield f"memory={memory}", {"memory": memory}, 1.0 if memory == "none" else 1.5
        for precision in ("float32", *(["tf32"] if self.run.device.type == "cuda" else []), "bfloat16"):
            if precision != self.config.precision:
                yield f"precision={precision}", {"precision": precision}, 3.0 if precision == "float32" else 1.0
        for factor in (0.5, 2):
            if batch := int(self.config.batch_size * factor):
                yield f"batch_size={batch}", {"batch_size": batch}, factor

    def _compiled_before(self) -> str:
        """What an earlier run of this flow measured: to compile it now takes long."""
        gain = self.trainer.compile_choice.gain
        return f"measured before: {gain}" if gain else "not measured: it takes minutes to compile a flow anew"

    def _try(self, change: dict, slower: float) -> str:
        """The figures with some keys changed, or in words why there are none."""
        config = replace(self.config, **change)
        try:
            parts = distributed.world(), config.trainer.accumulate
            choose_batch_size(config.batch_size, len(self.run.train), self.run.spec, *parts)
            check_batch_size(config.batch_size, *parts)
            trainer = _other_trainer(self.run, self.trainer.flow, config)
        except UsageError as error:
            return f"refused: {error}"
        wait = 3 * slower * self.measured.cost.seconds
        if wait > self.left or self.measured.sizes:
            return f"not measured: there is no time for {clock(wait)} more (dry_run=true with it set measures it)"
        needed, free = self._needed(config), free_bytes(self.run.device)
        if needed > free and config.batch_size > self.config.batch_size:
            return f"would not fit: it needs about {size(needed)}, {size(free)} are free"
        try:
            with tf32_as(config.precision):
                took, cost = self._measure(trainer)
        except FlowtrainError as error:
            return f"fails: {error}"
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return "would not fit: out of memory"
        self.left -= took
        return self._figures(cost, config.batch_size)

    def _measure(self, trainer: Trainer) -> tuple[float, Cost]:
        rehearsal, began = Rehearsal(trainer), time.perf_counter()
        cost = rehearsal.cost(seconds=min(EACH, self.left / 6), least=1)
        return distributed.broadcast_object(time.perf_counter() - began), cost

    def _needed(self, config: TrainConfig) -> float:
        return self.measured.cost.bytes * config.batch_size / self.config.batch_size

    def _figures(self, cost: Cost, batch: int) -> str:
        seconds = cost.seconds
        return f"{clock(seconds):9}  {_rate(batch / seconds):>10}  {size(cost.bytes)}"
