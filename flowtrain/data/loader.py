"""Batches: in a resumable random order for training, each example once for evaluation."""

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, count

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowtrain.data.batch import Batch
from flowtrain.data.order import permutation, shard
from flowtrain.data.split import Split
from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger(__name__)


class Loader:
    """Training batches: the slice of each global batch that belongs to this process.

    The order is a function of (seed, epoch) and augmentation a function of (seed, step), for any number of processes
    and workers and from any first step. Examples after the last full batch of an epoch are dropped.

    Args:
        batch_size: examples in a global batch.
        augment: called as ``augment(x, context, seed, step, rank, world)``, returns x and context; or None.
        workers: number of processes that decode images, for a split that streams.

    Raises:
        UsageError: ``batch_size`` is larger than the split, or not a multiple of ``world``.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int = 0,
        augment: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
        device="cpu",
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ):
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size}: must be at least 1")
        if batch_size > len(split):
            raise UsageError(f"batch_size={batch_size} is larger than the train split ({len(split)})")
        if batch_size % world:
            raise UsageError(f"batch_size={batch_size} cannot be shared evenly by {world} devices")
        self.split = split.to(device)
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.device, self.rank, self.world, self.workers = torch.device(device), rank, world, workers
        self.steps_per_epoch = len(split) // batch_size

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this process's slices of the batches of steps start_step, start_step + 1, … for ever."""
        batches = _take(self.split, self._indices(start_step), self.workers, replace=True)
        for step, (index, x, context) in enumerate(batches, start_step):
            if len(x) < self.batch_size // self.world:
                raise FlowtrainError("too many unreadable images one after another to replace them all")
            if self.augment is not None:
                x, context = self.augment(x, context, self.seed, step, self.rank, self.world)
            yield Batch(x, context, self._weights(index))

    def _weights(self, index: Tensor) -> Tensor | None:
        weights = self.split.weights
        if weights is None:
            return None
        return weights.index_select(0, index.to(weights.device)).to(self.device, non_blocking=True)

    def _indices(self, start_step: int) -> Iterator[Tensor]:
        mine = shard(self.batch_size, self.rank, self.world)
        epoch = None
        for step in count(start_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = permutation(self.seed, epoch, len(self.split)).to(self.split.index_device, non_blocking=True)
            start = step % self.steps_per_epoch * self.batch_size
            yield order[start + mine.start : start + mine.stop]

    def examples(self, step: int) -> list[int]:
        """The numbers of the examples in this process's slice of the batch at ``step``."""
        return next(self._indices(step)).tolist()

    def state_dict(self) -> dict[str, int | str]:
        """What identifies the data and their order; a checkpoint stores it with the step number."""
        return {"examples": len(self.split), "batch_size": self.batch_size, "seed": self.seed, "data": self.digest}

    @cached_property
    def digest(self) -> str:
        return self.split.digest()

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Raise FlowtrainError if the data or their order are not those of ``state``."""
        words = {"examples": "the train split's number of examples", "data": "the SHA-256 of the train split"}
        for key, now in self.state_dict().items():
            if (was := state.get(key)) != now:
                what = words.get(key, key)
                raise FlowtrainError(f"cannot resume: {what} was {was} and is now {now}; init=CKPT starts anew")


def evaluation_batches(
    split: Split,
    batch_size: int,
    device="cpu",
    rank: int = 0,
    world: int = 1,
    examples: int | None = None,
    workers: int = 0,
    as_many: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (indices (b,) on the CPU, examples (b, *shape), context (b, *context_shape) or None): every example
    exactly once over all processes.

    The processes share out the batches of a single process, so that noise can be a function of the batch, whatever
    the number of processes; some may get one batch fewer.

    Args:
        examples: read only this many, evenly spaced, since a folder is often sorted by class; None reads all.
        workers: number of processes that decode images, for a split that streams. With ``on_bad=skip`` an unreadable
            image is left out, not replaced.
        as_many: batches on each process; where one has fewer, it gets one without examples at the end.
    """
    length = len(split)
    number = length if examples is None else min(examples, length)
    chosen = torch.arange(number) * length // max(number, 1)
    batches = chosen.split(batch_size) if number else ()
    own, count = batches[rank::world], 0
    for index, x, context in _take(split.to(device), own, workers):
        if len(index):
            yield index, x, context
            count += 1
    while as_many and count < -(-len(batches) // world):
        for index, x, context in _take(split, [chosen[:1]], 0):
            yield index[:0], x[:0], None if context is None else context[:0]
        count += 1


def _take(
    split: Split, indices: Iterable[Tensor], workers: int, replace: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (index, examples, context) for each index; worker processes decode them if the split streams."""
    if not split.streams:
        for index in indices:
            yield index, *split.take(index)
        return
    left, failed = map(Tensor.tolist, indices), None  # lists: a slice of a tensor is pickled with all of its storage
    while True:
        waiting: deque[list[int]] = deque()
        batches = _worker_batches(split, replace, _record_waiting(left, waiting), workers)
        try:
            for index, x, problems in batches:
                waiting.popleft()
                split.report(problems)
                place = torch.tensor(index, dtype=torch.int64)
                yield place, x.to(split.device, non_blocking=True), split.context(index)
            return
        except WorkerFailure as error:
            line = f"{error} while it read {split.describe(waiting[0][0])} and those after it"
            if split.on_bad == "stop" or waiting[0] == failed:
                raise FlowtrainError(f"{line}; trainer.workers=0 reads without workers") from error
            log.warning("%s; on_bad=skip: new workers read them again", line)
            failed, left = waiting[0], chain([*waiting], left)


class WorkerFailure(Exception):
    """A worker process has ended."""


def _record_waiting(indices: Iterable[list[int]], waiting: deque) -> Iterator[list[int]]:
    for index in indices:
        waiting.append(index)
        yield index


def _worker_batches(split: Split, replace: bool, indices: Iterator[list[int]], workers: int) -> Iterator:
    """Yield what :class:`_Reader` returns for each index, in order. Raises WorkerFailure."""
    loader = DataLoader(
        _Reader(split, replace),
        sampler=indices,
        batch_size=None,  # the sampler yields whole batches
        collate_fn=_identity,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=split.device.type == "cuda",
        generator=torch.Generator(),  # otherwise it draws from the generator of the training noise
    )
    with _keep_sigchld_handler():
        batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, OSError) as error:  # the last two: it ended while it sent a batch
            if workers == 0:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise WorkerFailure(f"a data worker ended early ({reason})") from error
        yield batch


@contextmanager
def _keep_sigchld_handler():
    """Remove the SIGCHLD handler that torch installs inside this block. Without it, the end of a worker is found when
    its batch is due, at most 5 s later, and not in the middle of a step."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


class _Reader:
    """The dataset of the workers: it reads whole batches and returns problems as text, since not every exception can
    be pickled."""

    def __init__(self, split: Split, replace: bool):
        self.split, self.replace = split, replace

    def __getitem__(self, index: list[int]) -> tuple[list[int], Tensor, dict[int, str]]:
        return self.split.read(index, self.replace)


def _identity(batch):
    return batch


def _ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and a scheduler's SIGUSR1, which reach every process of a job, to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # torchrun and SLURM send SIGTERM to every process; a second one comes from the main process, to end its workers
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
