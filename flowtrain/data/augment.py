"""Augmentation of training pictures: a batch at a time, on the device that holds them."""

import torch
from torch import Tensor

from flowtrain.data.order import generator, shard

_STREAM = 1  # tells augmentation's random numbers from those of the order, which mix (seed, epoch)


class Augment:
    """Mirrors each picture with probability ½ (``flip``) and moves it by up to ``shift`` pixels each way.

    A moved picture's border is replicated. What happens to a picture depends on the seed, the step and its place in
    the global batch alone: the numbers are drawn for the global batch and sliced.
    """

    def __init__(self, flip: bool = False, shift: int = 0):
        self.flip, self.shift = flip, shift

    def __call__(self, x: Tensor, seed: int, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Pictures (b, C, H, W), this rank's slice of the global batch of b · world, to the same shape."""
        total = len(x) * world
        mine = shard(total, rank, world)
        numbers = generator(seed, step, _STREAM)
        mirrored = torch.randint(0, 2, (total,), generator=numbers)[mine]
        offsets = torch.randint(-self.shift, self.shift + 1, (2, total, 1), generator=numbers)[:, mine]
        if self.flip:
            x = torch.where(mirrored.bool().to(x.device)[:, None, None, None], x.flip(-1), x)
        if self.shift:
            down, right = offsets.to(x.device)
            height, width = x.shape[-2:]
            row = (torch.arange(height, device=x.device) + down).clamp(0, height - 1)
            column = (torch.arange(width, device=x.device) + right).clamp(0, width - 1)
            example = torch.arange(len(x), device=x.device)
            x = x.movedim(1, -1)[example[:, None, None], row[:, :, None], column[:, None, :]].movedim(-1, 1)
        return x.contiguous()
