"""Splits: examples that are read by number, here from memory; image_files.py has the split that streams."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import UsageError

DIGEST_BYTES = 2**26  # most bytes of data in a digest


class Split:
    """Examples numbered from 0.

    Attributes:
        description: one line for the log: what it is and where it came from.
        shape: the shape of one example.
        streams: whether examples are decoded when they are read; a loader then uses worker processes.
        index_device: where ``take`` needs its index; an index on that device costs no copy.
        columns: the :class:`Columns` of a table's train split, otherwise None.
        weights: how much each example counts in the loss and in evaluation, float32 (N,) of mean one; None: all alike.
        bad: a mapping from the number of each example found unreadable so far to the reason.
    """

    streams = False
    columns = None
    weights: Tensor | None = None

    def __init__(self, shape: tuple[int, ...], description: str):
        self.shape, self.description = tuple(shape), description
        self.index_device = torch.device("cpu")
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def digest(self) -> str:
        """A SHA-256 that changes with the examples and their order, of what is cheap to read."""
        raise NotImplementedError

    def take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The examples with numbers ``index`` (B,), uint8 or float32 (B, *shape), and their context, float32
        (B, *context_shape) or None, on the device of the last ``to``."""
        raise NotImplementedError

    def to(self, device) -> "Split":
        raise NotImplementedError

    def measure(self, flow, x: Tensor, context: Tensor | None) -> Tensor:
        """What an evaluation of ``flow`` averages over examples, (B,): their log-likelihoods in nats."""
        return flow(x, context)

    def shown(self, most: int) -> tuple[Tensor | None, Tensor | None]:
        """At most ``most`` examples to draw beside a flow's samples, with their contexts; None where there are none."""
        return self.take(torch.arange(min(most, len(self))))


class ArraySplit(Split):
    """Examples in one tensor (N, *shape), on the device if they fill at most half of its free memory, otherwise on the
    host.

    ``weights`` (N,) say how often each example counts: 2 is the example twice, 0 is an example that is not there. They
    are divided by their mean, once. A batch's weighted losses are then summed and divided by its number of examples,
    not by its sum of weights: over all batches of an epoch that is the weighted mean, for any batch size, number of
    processes and of accumulated parts.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """

    def __init__(
        self,
        data: Tensor,
        description: str = "array",
        context: Tensor | None = None,
        columns=None,
        weights: Tensor | None = None,
    ):
        super().__init__(data.shape[1:], description)
        self.data, self.context, self.columns = data, context, columns
        if weights is not None:
            weights = weights.double()
            if (weights < 0).any() or not 0 < weights.sum() < math.inf:
                raise ValueError("weights must be finite, at least 0, and not all 0")
            self.weights = (weights / weights.mean()).float()
        self.device = self.index_device = data.device

    def __len__(self) -> int:
        return len(self.data)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        index = index.to(self.index_device)
        return tuple(
            None if rows is None else rows.index_select(0, index).to(self.device, non_blocking=True)
            for rows in (self.data, self.context)
        )

    def digest(self) -> str:
        """SHA-256 of the examples, their context and weights; of evenly spaced ones if they are more than 64 MiB."""
        step = max(1, -(-self.data.nbytes // DIGEST_BYTES))
        digest = hashlib.sha256()
        for part in (self.data, self.context, self.weights):
            if part is not None:
                digest.update(part[::step].cpu().contiguous().numpy())
        return digest.hexdigest()

    def to(self, device) -> "ArraySplit":
        self.device = torch.device(device)
        size = self.data.nbytes + (0 if self.context is None else self.context.nbytes)
        if self.device.type != "cuda" or size <= torch.cuda.mem_get_info(self.device)[0] // 2:
            self.data = self.data.to(self.device)
            self.context = None if self.context is None else self.context.to(self.device)
            self.weights = None if self.weights is None else self.weights.to(self.device)
            self.index_device = self.data.device
        return self


def split_indices(length: int, val: float | int, test: float | int, seed: int) -> dict[str, np.ndarray]:
    """Split ``length`` examples at random: a mapping from "train", "val" and "test" to their numbers.

    The first part of a permutation by numpy's ``default_rng(seed)`` is test, the next is val, the rest is train.

    Args:
        val, test: counts, or fractions of ``length``, rounded down but at least one example; 0 is an empty split.

    Raises:
        UsageError: nothing is left for train.
    """
    tests, vals = (max(1, int(length * part)) if 0 < part < 1 else int(part) for part in (test, val))
    if tests + vals >= length:
        raise UsageError(_too_few(length, vals, tests))
    order = np.random.default_rng(seed).permutation(length)
    return {"test": order[:tests], "val": order[tests : tests + vals], "train": order[tests + vals :]}


def _too_few(length: int, vals: int, tests: int) -> str:
    """Why ``length`` examples cannot be split so, and what would do."""
    have = "1 example is" if length == 1 else f"{length} examples are"
    names, count = ("train, validation and test", 3) if tests else ("train and validation", 2)
    if length < count:
        sizes = "dataset.val_size=1" + (" and dataset.test_size=1" if tests else "")
        return f"{have} too few for a {names} split: at least {count} are needed, which {sizes} would share out"
    fit = max(1, length // 10)
    return (
        f"{have} too few for a validation split of {vals}"
        + (f" and a test split of {tests}" if tests else "")
        + f": dataset.val_size={fit}"
        + (f" dataset.test_size={fit}" if tests else "")
        + f" would leave {length - fit * (count - 1)} for train"
    )
