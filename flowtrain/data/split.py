"""A split: examples to take by number. This one is held in memory; images.py has the one that reads files."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from flowtrain.errors import UsageError

DIGESTED = 2**26  # bytes


class Split:
    """Examples numbered from 0.

    Attributes:
        description: what it is and where it came from, one line for the run's log.
        shape: the shape of one example.
        streams: whether examples are decoded on demand (then a loader uses worker processes).
        index_device: the device where ``take`` wants its index: giving it there costs no wait.
        columns: of a table, what its columns are (a Columns record), else None.
        bad: number of example -> why it could not be read, for those met so far.
    """

    streams = False
    columns = None

    def __init__(self, shape: tuple[int, ...], description: str):
        self.shape, self.description = tuple(shape), description
        self.index_device = torch.device("cpu")
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def digest(self) -> str:
        """A SHA-256 that other examples, or another order, would change: of what is cheap to look at."""
        raise NotImplementedError

    def take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Examples ``index`` (B,), uint8 or float32 (B, *shape), and their context, float32 (B, *context_shape) or
        None, on the device of the last ``to``."""
        raise NotImplementedError

    def to(self, device) -> "Split":
        raise NotImplementedError


class ArraySplit(Split):
    """Examples held as one tensor (N, *shape), on the device where they fit there, else in the host's memory."""

    def __init__(self, data: Tensor, description: str = "array", context: Tensor | None = None, columns=None):
        super().__init__(data.shape[1:], description)
        self.data, self.context, self.columns = data, context, columns
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
        """Of all numbers, or of evenly spaced examples where they are more than 64 MiB."""
        step = max(1, -(-self.data.nbytes // DIGESTED))
        parts = [part[::step].cpu().contiguous().numpy() for part in (self.data, self.context) if part is not None]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return digest.hexdigest()

    def to(self, device) -> "ArraySplit":
        self.device = torch.device(device)
        size = self.data.nbytes + (0 if self.context is None else self.context.nbytes)
        if self.device.type != "cuda" or size <= torch.cuda.mem_get_info(self.device)[0] // 2:
            self.data = self.data.to(self.device)
            self.context = None if self.context is None else self.context.to(self.device)
            self.index_device = self.data.device
        return self


def split_indices(length: int, val: float | int, test: float | int, seed: int) -> dict[str, np.ndarray]:
    """The numbers of the examples in "train", "val" and "test".

    ``val`` and ``test`` are counts, or fractions of ``length`` (rounded down, but at least one); 0 is none at all.
    A permutation by numpy's ``default_rng(seed)`` gives its first part to test, the next to val, the rest to train.
    UsageError where nothing is left for train.
    """
    tests, vals = (max(1, int(length * part)) if 0 < part < 1 else int(part) for part in (test, val))
    if tests + vals >= length:
        raise UsageError(
            f"{length} examples are too few for a validation split of {vals}"
            + (f" and a test split of {tests}" if tests else "")
            + ": lower dataset.val_size"
            + (" or dataset.test_size" if tests else "")
        )
    order = np.random.default_rng(seed).permutation(length)
    return {"test": order[:tests], "val": order[tests : tests + vals], "train": order[tests + vals :]}
