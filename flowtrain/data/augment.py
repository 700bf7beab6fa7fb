"""Augmentation of training images, a batch at a time, on the device of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.data.dataset import Dataset
from flowtrain.data.order import shard
from flowtrain.runtime.seeds import generator

_STREAM = 1  # seeds are (seed, step, _STREAM); the order of the data uses (seed, epoch)
TURN, SHEAR, SCALE, MOVE = 0.2, 0.15, 0.15, 0.09  # standard deviations: radians, two ratios, a part of the image's side


class Augment:
    """Mirror each image with probability ½ (``flip``), shift it by up to ``shift`` pixels each way, and warp it with
    probability ``warp``: turn, shear, scale and move it a little. Beyond the border, the pixels of the border repeat.

    Warping blurs an image, and the data are not blurred. So a warped image has half of its label, by which a flow tells
    the two kinds apart: distribution augmentation (Jun et al. 2020, "Distribution Augmentation for Generative
    Modeling"). It needs labels as context.

    What happens to an image depends only on the seed, the step and its position in the global batch: every process
    draws the random numbers of the global batch and uses its slice of them.
    """

    def __init__(self, flip: bool = False, shift: int = 0, warp: float = 0.0):
        self.flip, self.shift, self.warp = flip, shift, warp

    def __call__(
        self, x: Tensor, context: Tensor | None, seed: int, step: int, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Augment this rank's slice of a global batch of b · world images.

        Args:
            x: images (b, C, H, W), whole or real numbers.
            context: labels (b, classes), one-hot, for ``warp``; else of any shape, or None.

        Returns:
            Images and their context, of the same shapes and types.
        """
        total, (height, width) = len(x) * world, x.shape[-2:]
        mine = shard(total, rank, world)
        numbers = generator(seed, step, _STREAM)
        mirrored = torch.randint(0, 2, (total, 1), generator=numbers)[mine]
        offsets = torch.randint(-self.shift, self.shift + 1, (2, total, 1), generator=numbers)[:, mine]
        if self.flip or self.shift:
            down, right = offsets.to(x.device, non_blocking=True)
            row = (torch.arange(height, device=x.device) + down).clamp(0, height - 1)
            column = (torch.arange(width, device=x.device) + right).clamp(0, width - 1)
            if self.flip:
                column = torch.where(mirrored.to(x.device, non_blocking=True) == 1, width - 1 - column, column)
            source = (row[:, :, None] * width + column[:, None, :]).view(len(x), 1, -1)  # flat index of each pixel
            x = x.flatten(2).gather(2, source.expand(-1, x.shape[1], -1)).view_as(x)
        if self.warp:
            uniform = torch.rand(2, total, generator=numbers)[:, mine].to(x.device, non_blocking=True)
            normal = torch.randn(6, total, generator=numbers)[:, mine].to(x.device, non_blocking=True)
            chosen = uniform[0] < self.warp
            x = torch.where(chosen.view(-1, 1, 1, 1), _warped(x, normal, uniform[1]), x)
            context = torch.where(chosen[:, None], context / 2, context)
        return x, context


def _warped(x: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    """Images x (b, C, H, W) under affine maps by standard normal numbers (6, b). Numbers between two grey levels become
    one of these by a uniform number for each image, (b,), so that means remain."""
    turn, shear, (down, right) = TURN * normal[0], SHEAR * normal[1], 2 * MOVE * normal[2:4]
    scale, stretch = (SCALE * normal[4:]).exp()
    ratio = x.shape[2] / x.shape[3]  # grid_sample counts in halves of each side
    rows = [
        torch.stack((scale * turn.cos(), (shear - scale * turn.sin()) * ratio, right), 1),
        torch.stack((stretch * turn.sin() / ratio, stretch * turn.cos(), down), 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    warped = F.grid_sample(x.to(grid.dtype), grid, padding_mode="border", align_corners=False)
    if not x.is_floating_point():
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)  # which rounding might leave
        warped = (warped + uniform.view(-1, 1, 1, 1)).floor().clamp(low, high)
    return warped.to(x.dtype)


class Augmented(Dataset):
    """Images whose train split may be augmented. Arguments besides those of :class:`Dataset`:

    Args:
        flip, shift, warp: see :class:`Augment`.
    """

    def __init__(self, *, flip: bool = False, shift: int = 0, warp: float = 0.0, **common):
        super().__init__(**common)
        self._check_type("flip", flip, bool, "true or false")
        self._check_type("shift", shift, int, "a number of pixels")
        self._check_type("warp", warp, (int, float), "a probability")
        self.flip, self.shift, self.warp = bool(flip), shift or 0, warp or 0.0

    @property
    def augment(self) -> Augment | None:
        """The augmentation of the train split, or None."""
        return Augment(self.flip, self.shift, self.warp) if self.flip or self.shift or self.warp else None

    def _check_augmentation(self, shape: Sequence[int], labelled: bool) -> None:
        """Refuse an augmentation that does not fit examples of ``shape``, or that needs labels as their context."""
        for key in ("flip", "shift", "warp"):
            if (value := getattr(self, key)) and len(shape) != 3:
                self._refuse(key, value, f"only images can be augmented, not shape {list(shape)}")
        if self.shift < 0 or self.shift >= min(shape[-2:]):
            self._refuse("shift", self.shift, f"must be between 0 and {min(shape[-2:]) - 1} pixels")
        if not 0 <= self.warp < 1:
            self._refuse("warp", self.warp, "must be at least 0 and below 1")
        if self.warp and not labelled:
            why = "a flow knows a warped image by its label; set dataset.context=label, or warp=0"
            self._refuse("warp", self.warp, why)
