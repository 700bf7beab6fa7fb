"""The order of the data: a function of (seed, epoch) only, so that a run can resume at any step."""

import torch
from torch import Tensor

from flowtrain.runtime.seeds import generator


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of ``length`` examples in an epoch: int64, on the CPU."""
    return torch.randperm(length, generator=generator(seed, epoch))


def shard(length: int, rank: int, world: int) -> slice:
    """The contiguous slice of a global batch of ``length`` that belongs to process ``rank`` of ``world``."""
    return slice(rank * length // world, (rank + 1) * length // world)
