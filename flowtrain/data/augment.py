"""Augmentation of training images, a batch at a time, on the device of the batch."""

import torch
from torch import Tensor

from flowtrain.data.order import shard
from flowtrain.runtime.seeds import generator

_STREAM = 1  # seeds are (seed, step, _STREAM); the order of the data uses (seed, epoch)


class Augment:
    """Mirror each image with probability ½ (``flip``) and shift it by up to ``shift`` pixels each way, replicating
    its border.

    What happens to an image depends only on the seed, the step and its position in the global batch: every process
    draws the random numbers of the global batch and uses its slice of them.
    """

    def __init__(self, flip: bool = False, shift: int = 0):
        self.flip, self.shift = flip, shift

    def __call__(self, x: Tensor, seed: int, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Augment this rank's slice (b, C, H, W) of a global batch of b · world images; the shape stays."""
        total, (height, width) = len(x) * world, x.shape[-2:]
        mine = shard(total, rank, world)
        numbers = generator(seed, step, _STREAM)
        mirrored = torch.randint(0, 2, (total, 1), generator=numbers)[mine].to(x.device, non_blocking=True)
        offsets = torch.randint(-self.shift, self.shift + 1, (2, total, 1), generator=numbers)[:, mine]
        down, right = offsets.to(x.device, non_blocking=True)
        row = (torch.arange(height, device=x.device) + down).clamp(0, height - 1)
        column = (torch.arange(width, device=x.device) + right).clamp(0, width - 1)
        if self.flip:
            column = torch.where(mirrored == 1, width - 1 - column, column)
        source = (row[:, :, None] * width + column[:, None, :]).view(len(x), 1, -1)  # flat index of each pixel
        return x.flatten(2).gather(2, source.expand(-1, x.shape[1], -1)).view_as(x)
