"""The base classes of image datasets: the keys that their YAML files share, checked."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.augment import Augmented
from flowtrain.data.labels import label_context
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.data.split import ArraySplit, split_indices


class Images(Augmented):
    """Images of integers 0 … grey_levels − 1. Arguments besides those of :class:`Augmented`:

    Args:
        image_size: side in pixels, or (height, width).
        channels: 1 (grey) or 3 (RGB).
        bits: how many of the 8 bits to keep, floor(x / 2^(8 − bits)); None keeps all.
        context: "label": each example comes with its class as a one-hot vector; None: without.
    """

    native_size: int | None = None  # of the files; None: any
    native_channels: int | None = None
    native_levels = 256
    classes: int | None = None  # number of labels; None: no labels
    own_splits = ("test",)
    default_size, default_channels = 64, 3

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] | None = None,
        channels: int | None = None,
        bits: int | None = None,
        context: str | None = None,
        **common,
    ):
        super().__init__(**common)
        self._check_type("image_size", image_size, (int, list, tuple), "a number of pixels, or [height,width]")
        self._check_type("channels", channels, int, "1 or 3")
        self._check_type("bits", bits, int, "a number from 1 to 8")
        shape = self._choose_shape(image_size, channels)
        grey_levels, self._dropped_bits = self._choose_levels(bits)
        if context is not None and (context != "label" or not self.has_labels):
            why = "must be label, or null" if self.has_labels else f"{self.name} has no labels"
            self._refuse("context", context, why)
        self._check_augmentation(shape, context == "label")
        self.context, self._description = context, DataSpec(self.name, shape, grey_levels)

    @property
    def spec(self) -> DataSpec:
        return replace(self._description, context=LabelContext(self.classes)) if self.context else self._description

    @property
    def has_labels(self) -> bool:
        """Whether ``context="label"`` means something."""
        return self.classes is not None

    def _choose_shape(self, image_size: int | Sequence[int] | None, channels: int | None) -> tuple[int, ...]:
        size = (self.native_size or self.default_size) if image_size is None else image_size
        channels = (self.native_channels or self.default_channels) if channels is None else channels
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            self._refuse("image_size", size, f"must be {self.native_size or 'at least 1, or [height,width]'}")
        if self.native_size not in (None, *sides) or self.native_size and sides[0] != sides[1]:
            self._refuse("image_size", size, f"must be {self.native_size} for {self.name}")
        allowed = (1, 3) if self.native_channels is None else (self.native_channels,)
        if channels not in allowed:
            self._refuse("channels", channels, f"must be {' or '.join(map(str, allowed))} for {self.name}")
        return channels, *sides

    def _choose_levels(self, bits: int | None) -> tuple[int, int]:
        """The number of grey levels, and how many of the 8 bits to drop."""
        if bits is not None and self.native_levels != 256:
            self._refuse("bits", bits, f"{self.name} has {self.native_levels} grey levels; only 256 can be reduced")
        if bits is not None and not 1 <= bits <= 8:
            self._refuse("bits", bits, "must be between 1 and 8")
        return (self.native_levels, 0) if bits is None else (2**bits, 8 - bits)


class ArrayImages(Images):
    """Images that fit into memory."""

    uses_path = False

    def _load(self, part: str) -> tuple[Tensor, Tensor | None, str]:
        """Load "train" or "test" as the files have them: the images, uint8 (N, C, H, W), their labels, int64 (N,), or
        None without labels, and the origin of the data for the description."""
        raise NotImplementedError

    def _open(self, name: str) -> ArraySplit:
        own = name in self.own_splits
        data, labels, origin = self._load(name if own else "train")
        context = label_context(labels, self.classes) if self.spec.context else None
        if not own:
            chosen = split_indices(len(data), self.val_size, self.test_size or 0, self.split_seed)[name]
            chosen = torch.from_numpy(np.ascontiguousarray(chosen))
            data, context = data[chosen], None if context is None else context[chosen]
        return ArraySplit(data >> self._dropped_bits, f"{self.name} {name}: {len(data):,} examples, {origin}", context)
