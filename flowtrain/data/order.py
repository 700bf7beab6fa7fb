"""The order of the data: a pure function of (seed, epoch), so that any step of a run can be found again."""

import torch
from torch import Tensor

from flowtrain.runtime.seeds import generator


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of ``length`` examples in an epoch: int64, on the CPU."""
    return torch.randperm(length, generator=generator(seed, epoch))


def shard(length: int, rank: int, world: int) -> slice:
    """The contiguous part of a global batch of ``length`` that process ``rank`` of ``world`` works on."""
    return slice(rank * length // world, (rank + 1) * length // world)
