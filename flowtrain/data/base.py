"""What every set of pictures has in common: the keys of its YAML file, checked, and three splits."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.augment import Augment
from flowtrain.data.split import ArraySplit, Split, cut
from flowtrain.errors import Refused

SPLITS = ("train", "val", "test")
_KINDS = {  # key -> what its value must be, for the command line makes anything of anything
    "download": (bool, "true or false"),
    "flip": (bool, "true or false"),
    "image_size": (int, "a number of pixels"),
    "channels": (int, "1 or 3"),
    "bits": (int, "a number from 1 to 8"),
    "shift": (int, "a number of pixels"),
    "split_seed": (int, "a whole number"),
    "val_size": ((int, float), "a number of examples, or a fraction below 1"),
    "test_size": ((int, float), "a number of examples, or a fraction below 1"),
}


class Images:
    """Pictures as integers in 0 … levels − 1. Building one touches no file; :meth:`split` does.

    Every dataset takes the same keys, so that one can stand for another:

    Args:
        name: what messages call it.
        root: the folder of all data, where downloads go too.
        path: this set's own folder or file, where it has one.
        download: whether missing files may be fetched.
        image_size, channels: side in pixels, 1 (grey) or 3 (RGB).
        shape: (channels, image_size, image_size); left out, those two decide.
        bits: keep this many of the 8, floor(x / 2^(8 − bits)); None keeps all.
        levels: the number of integer values that follows from ``bits``; only checked here.
        context: "label" for examples that come with their class, one-hot, or None.
        halvings, context_shape: what models ask about these data; not used here.
        flip, shift: augmentation of the train split (see Augment).
        val_size, test_size: count or fraction cut off with a fixed seed; None where a set has such a split itself.
        split_seed: the seed of that cut.
        on_bad: "stop" or "skip" at an unreadable picture.

    Raises Refused, naming the key, for what does not fit.
    """

    native_name: str
    native_size: int | None = None  # None: any
    native_channels: int | None = None
    native_levels = 256
    classes: int | None = None  # of the labels, where there are any
    own_splits: tuple[str, ...] = ("test",)  # besides train, those that the files themselves distinguish
    uses_path = True
    default_size, default_channels = 64, 3
    default_val: float | int | None = 0.1
    default_test: float | int | None = None

    def __init__(
        self,
        *,
        name: str | None = None,
        root: str = "data",
        path: str | None = None,
        download: bool = True,
        image_size: int | None = None,
        channels: int | None = None,
        shape: tuple[int, ...] | None = None,
        bits: int | None = None,
        levels: int | None = None,
        halvings: int | None = None,
        context: str | None = None,
        context_shape: tuple[int, ...] | None = None,
        flip: bool = False,
        shift: int = 0,
        val_size: float | int | None = None,
        test_size: float | int | None = None,
        split_seed: int = 0,
        on_bad: str = "stop",
    ):
        given = locals()
        for key, (kind, words) in _KINDS.items():
            value = given[key]
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
                self._refuse(key, value, f"must be {words}")
        self.name = name or self.native_name
        self.root = Path(os.path.expanduser(root))
        self.path = None if path is None else Path(os.path.expanduser(path))
        self.download, self.split_seed, self.on_bad = download, split_seed, on_bad
        self.halvings, self.context_shape = halvings, context_shape
        self.labelled = context is not None
        self.shape = self._shape(image_size, channels, shape)
        self.levels, self._drop = self._levels(bits, levels)
        self.flip, self.shift = flip, shift
        self.val_size = self.default_val if val_size is None else val_size
        self.test_size = self.default_test if test_size is None else test_size

        if path is not None and not self.uses_path:
            self._refuse("path", path, f"{self.name}'s files are looked for under dataset.root")
        if self.labelled and (context != "label" or not self.classes):
            self._refuse("context", context, "must be label, or null" if self.classes else f"{self.name} has no labels")
        if on_bad not in ("stop", "skip"):
            raise Refused(f"on_bad={on_bad}: must be stop or skip")
        if (flip or shift) and len(self.shape) != 3:
            self._refuse("flip", flip, f"only pictures can be mirrored and shifted, not shape {list(self.shape)}")
        if shift < 0 or shift >= min(self.shape[-2:]):
            self._refuse("shift", shift, f"must be between 0 and {min(self.shape[-2:]) - 1} pixels")
        for part, size in (("val", self.val_size), ("test", self.test_size)):
            if part in self.own_splits and size is not None:
                self._refuse(f"{part}_size", size, f"{self.name} has its own {part} split; leave it null")
            if part not in self.own_splits and not (0 < size < 1 or (size >= 1 and size == int(size))):
                self._refuse(f"{part}_size", size, f"must be {_KINDS['val_size'][1]}")

    def split(self, name: str) -> Split:
        """Opens "train", "val" or "test"; every process must ask, since the first one downloads for all.

        Refused where files are missing, FlowtrainError where they cannot be read.
        """
        if name not in SPLITS:
            raise Refused(f"split={name}: must be one of {', '.join(SPLITS)}")
        return self._open(name)

    @property
    def augment(self) -> Augment | None:
        """For the train split's Loader."""
        return Augment(self.flip, self.shift) if self.flip or self.shift else None

    def _open(self, name: str) -> Split:
        raise NotImplementedError

    def _shape(self, image_size, channels, shape) -> tuple[int, ...]:
        size = image_size or self.native_size or self.default_size
        channels = channels or self.native_channels or self.default_channels
        if size < 1 or self.native_size not in (None, size):
            self._refuse("image_size", size, f"must be {self.native_size or 'at least 1'} for {self.name}")
        allowed = (1, 3) if self.native_channels is None else (self.native_channels,)
        if channels not in allowed:
            self._refuse("channels", channels, f"must be {' or '.join(map(str, allowed))} for {self.name}")
        expected = (channels, size, size)
        if shape is not None and tuple(shape) != expected:
            self._refuse("shape", list(shape), f"image_size and channels make it {list(expected)}")
        return expected

    def _levels(self, bits, levels) -> tuple[int, int]:
        """(levels, bits to drop)"""
        if bits is not None and self.native_levels != 256:
            self._refuse("bits", bits, f"{self.name} has {self.native_levels} levels; only 256 can be reduced")
        if bits is not None and not 1 <= bits <= 8:
            self._refuse("bits", bits, "must be between 1 and 8")
        expected = self.native_levels if bits is None else 2**bits
        if levels not in (None, expected):
            self._refuse("levels", levels, f"dataset.bits={'null' if bits is None else bits} makes it {expected}")
        return expected, 0 if bits is None else 8 - bits

    def _refuse(self, key, value, why) -> None:
        raise Refused(f"dataset.{key}={value}: {why}")


class ArrayImages(Images):
    """Pictures that fit into memory: the files' own train split, and test split where they have one."""

    uses_path = False

    def _load(self, part: str) -> tuple[Tensor, Tensor | None, str]:
        """The pictures of "train" or "test" as the files have them, uint8 (N, C, H, W), their labels, int64 (N,), where
        they have any, and where they came from."""
        raise NotImplementedError

    def _open(self, name: str) -> ArraySplit:
        own = name in self.own_splits
        data, labels, origin = self._load(name if own else "train")
        context = one_hot(labels, self.classes) if self.labelled else None
        if not own:
            chosen = cut(len(data), self.val_size, self.test_size or 0, self.split_seed)[name]
            chosen = torch.from_numpy(np.ascontiguousarray(chosen))
            data, context = data[chosen], None if context is None else context[chosen]
        return ArraySplit(data >> self._drop, f"{self.name} {name}: {len(data):,} examples, {origin}", context)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (N,) as the context of a conditional flow, float32 (N, classes)."""
    return torch.nn.functional.one_hot(labels, classes).float()
