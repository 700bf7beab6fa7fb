"""Synthetic images of any shape, for smoke tests and benchmarks without data."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.images import ArrayImages

_EXAMPLES = range(512, 4096 + 1)
_BYTES = 2**26


class Synthetic(ArrayImages):
    """A diagonal ramp with a random brightness for each example and a little noise: easy to learn.

    There are 4,096 examples, fewer (but at least 512) if they would fill more than 64 MiB.

    Args:
        shape: of an example, one or more sides; None: (channels, image_size, image_size).
        keys: see :class:`Images`.
    """

    native_name = "synthetic"
    own_splits = ()
    uses_root = False
    default_size = 32
    default_val = default_test = 0.1

    def __init__(self, *, shape: Sequence[int] | None = None, **keys):
        self._shape = shape
        super().__init__(**keys)

    def _choose_shape(self, image_size, channels):
        if self._shape is None:
            return super()._choose_shape(image_size, channels)
        self._check_type("shape", self._shape, (list, tuple), "a list of sides, such as [3,32,32]")
        if not self._shape or not all(isinstance(side, int) and side >= 1 for side in self._shape):
            self._refuse("shape", list(self._shape), "must be one or more sides of at least 1")
        return tuple(self._shape)

    def _load(self, part: str) -> tuple[Tensor, None, str]:
        dims = int(np.prod(self.spec.shape))
        number = min(max(_BYTES // dims, _EXAMPLES[0]), _EXAMPLES[-1])
        ramp = sum(np.meshgrid(*(np.linspace(-1, 1, side) for side in self.spec.shape), indexing="ij")) / len(
            self.spec.shape
        )
        draw = np.random.default_rng(self.split_seed)
        data = np.empty((number, *self.spec.shape), dtype=np.uint8)
        for example in data:
            brightness, noise = draw.normal(0, 32), draw.integers(-12, 13, self.spec.shape)
            example[...] = np.clip(128 + 48 * ramp + brightness + noise, 0, 255)
        return torch.from_numpy(data), None, f"generated from dataset.split_seed={self.split_seed}"
