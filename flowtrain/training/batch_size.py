"""The batch size of a run: that given, that of the run it resumes, or one that suits the data and the machine."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from flowtrain.config.schema import TrainConfig, check_batch_size
from flowtrain.engine.auto import choose_batch_size
from flowtrain.engine.batch_search import START, Trial, knee, largest_that_fits, sizes_between
from flowtrain.engine.rehearsal import Rehearsal, free_bytes
from flowtrain.runtime import distributed
from flowtrain.training.memory import memory_of_steps
from flowtrain.training.optimizer import budget_of
from flowtrain.training.start import average_of

log = logging.getLogger("flowtrain")

STEPS, MINUTES = 500, 2  # a run shorter than one of these measures nothing, since that costs about 30 steps
USUAL, STEPS_OF_EPOCH = 64, 16  # larger sizes than the usual one leave at least so many steps in an epoch
MOST = {"cpu": 256, "cuda": 512}  # examples: more do not make a run on images learn faster
ROOM = 0.9, 0.8  # of the free memory for a step of one process, and of several, which must not meet the limit alone
SECONDS = 4.0  # that a search on a CPU may take, the first size aside


def batch_size_of(run) -> int:
    """The batch size of a :class:`flowtrain.training.setup.SetUp`. Raises UsageError."""
    config, rows, loader = run.config, len(run.train), (run.state or {}).get("loader")
    given = config.batch_size
    may_be_rounded = config.smoke and run.state and given == run.state["config"]["batch_size"]
    if isinstance(loader, dict) and (given == "auto" or may_be_rounded):
        given = loader.get("batch_size", given)
    parts = distributed.world(), config.trainer.accumulate
    share = parts[0] * parts[1]
    if config.smoke and run.state is None:  # conf/smoke.yaml has cut it down, to a size that may not be shared evenly
        given = math.ceil(given / share) * share
    if given == "auto" and run.spec.is_image and measures(config, rows):
        sizes = _sizes(rows, share, run.device)
        if len(sizes) > 1:
            return _measured(run, sizes)
    size = choose_batch_size(given, rows, run.spec, *parts)
    check_batch_size(size, *parts)
    return size


def measures(config: TrainConfig, rows: int) -> bool:
    """Whether a run of images measures steps of several sizes: a short one would spend more on that than it gains, and
    ``deterministic=true`` lets no clock decide."""
    budget = budget_of(config, max(1, rows // USUAL))
    long = (budget.steps or math.inf) >= STEPS and (budget.minutes or math.inf) >= MINUTES
    return long and not config.deterministic


def _sizes(rows: int, share: int, device: torch.device) -> list[int]:
    most = max(USUAL, min(rows // STEPS_OF_EPOCH, MOST[device.type]))
    return sizes_between(START if device.type == "cpu" else 1, min(rows, most), share)


def _measured(run, sizes: list[int]) -> int:
    """Measure steps of a flow that is then forgotten: it leaves the run's weights, noise and data order alone."""
    on_gpu = run.device.type == "cuda"
    first = next((size for size in sizes if size >= START), sizes[-1])
    one_by_one = replace(run.config.trainer, cuda_graph=False)  # a graph takes steps to record
    start = replace(run.config, batch_size=first, init=None, trainer=one_by_one)
    with memory_of_steps(start, run.device, size=1), _generators_and_threads_kept(run.device):
        flow = run.new_flow(start)

        def rehearsal(size: int) -> Rehearsal:
            gc.collect()  # the Trainer before: its hooks would synchronize the gradients once more
            config = replace(start, batch_size=size)
            return Rehearsal(run.trainer(flow, config, ema=average_of(flow, config)))

        def measure(size: int) -> tuple[float, int]:
            cost = rehearsal(size).cost(seconds=0.2, most=4)
            every = distributed.all_gather_object((cost.fastest, cost.bytes))
            return max(seconds for seconds, _ in every), max(peak for _, peak in every)

        room = min(distributed.all_gather_object(free_bytes(run.device))) * ROOM[distributed.world() > 1]
        rehearsal(start.batch_size).choose_threads()
        if on_gpu:
            size, trials = largest_that_fits(measure, sizes, room)
        else:
            size, trials = knee(measure, sizes, room, SECONDS, _common_clock)
    log.info("batch_size=auto: %d; %s (batch_size=N sets it)", size, _describe(trials, on_gpu))
    return size


@contextmanager
def _generators_and_threads_kept(device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)


def _common_clock() -> float:
    return distributed.broadcast_object(time.monotonic())


def _describe(trials: list[Trial], on_gpu: bool) -> str:
    if on_gpu:
        return "a step needs " + ", ".join(f"{trial.bytes / 2**30:.2f} GiB with {trial.size}" for trial in trials)
    return "examples a second: " + ", ".join(f"{trial.rate:.0f} with {trial.size}" for trial in trials)
