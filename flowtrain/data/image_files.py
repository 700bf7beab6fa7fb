"""Image files: decoding one, and a split of them."""

import hashlib
import logging
import os
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowtrain.data.image_sources import Source
from flowtrain.data.labels import label_context
from flowtrain.data.split import Split
from flowtrain.errors import FlowtrainError

log = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000  # a larger image is unreadable: decoding it would take gigabytes
GIF_TAIL = 4096
_TRIES = 100  # images to try in place of an unreadable one


def load_image(file: BinaryIO, mode: str, exact: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image, rotated as its EXIF data say and converted to PIL's ``mode``.

    Args:
        exact: the only (width, height) allowed; None allows any.

    Raises:
        Exception: of many kinds, if the file is damaged, incomplete, too large or of another size.
    """
    with warnings.catch_warnings(action="ignore"):  # a large image warns, and is refused below
        image = Image.open(file)
    with image:
        if image.format == "GIF" and not _is_whole_gif(file):  # PIL accepts the beginning of one
            raise ValueError("its end is missing")
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} allowed")
        if exact and (width, height) != exact:
            raise ValueError(f"it is {width}x{height}, not {exact[0]}x{exact[1]}")
        if image.mode.startswith("I;16"):  # PIL would clip 16 bits to 255 instead of scaling them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert(mode)


def _is_whole_gif(file: BinaryIO) -> bool:
    """Whether a GIF has its final byte, before at most ``GIF_TAIL`` zeros. The position in ``file`` stays."""
    place = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - GIF_TAIL))
    whole = file.read().rstrip(b"\0").endswith(b";")
    file.seek(place)
    return whole


def decode(
    file: BinaryIO,
    sides: tuple[int, int],
    channels: int,
    box: tuple[int, int, int, int] | None = None,
    exact: bool = False,
) -> np.ndarray:
    """Decode an image as uint8 (channels, *sides): grey for one channel, RGB for three.

    Args:
        sides: (height, width).
        box: a crop (left, top, right, bottom) that comes first. Of the rest, or of the image without ``box``, the
            largest centred rectangle with the ratio of ``sides`` is resized (bicubic, antialiased).
        exact: refuse an image of another size instead of resizing it.

    Raises:
        Exception: as :func:`load_image`.
    """
    size = sides[1], sides[0]
    image = load_image(file, "L" if channels == 1 else "RGB", size if exact else None)
    left, top, right, bottom = box or (0, 0, *image.size)
    if right > image.width or bottom > image.height:
        raise ValueError(f"{image.width}x{image.height} pixels are too few for the crop {box}")
    scale = min((right - left) / size[0], (bottom - top) / size[1])
    width, height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    left, top = left + (right - left - width) // 2, top + (bottom - top - height) // 2
    image = image.crop((left, top, left + width, top + height))  # before resizing: pixels outside would blend in
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.array(image).reshape(*sides, channels).transpose(2, 0, 1)


class ImageFileSplit(Split):
    """Images that are decoded from their files each time they are read.

    Args:
        source, names: the place of the images, and their names in it.
        shape: (channels, height, width) of one example.
        shift: how many of the 8 bits to drop, the least significant ones.
        on_bad: "stop" raises FlowtrainError at an unreadable image; "skip" reads the next readable one instead,
            records the problem in ``bad`` and warns once.
        box, exact: see :func:`decode`.
        labels: the number of each image's class, int64 (N,), and ``classes``, how many there are; or None.
    """

    streams = True

    def __init__(
        self,
        source: Source,
        names: Sequence[str],
        shape: tuple[int, int, int],
        shift: int = 0,
        on_bad: str = "stop",
        box: tuple[int, int, int, int] | None = None,
        exact: bool = False,
        description: str = "images",
        labels: Tensor | None = None,
        classes: int = 0,
    ):
        super().__init__(shape, description)
        self.labels, self.classes = labels, classes
        self.source, self.names, self.shift, self.on_bad = source, names, shift, on_bad
        self.box, self.exact = box, exact
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 of the images' names."""
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()

    def describe(self, number: int) -> str:
        return f"the image {self.source.location(self.names[number])} (index {number})"

    def to(self, device) -> "ImageFileSplit":
        self.device = torch.device(device)
        return self

    def take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        numbers, images, problems = self.read(index.tolist(), replace=True)
        self.report(problems)
        if len(images) < len(index):
            raise FlowtrainError("too many unreadable images one after another to replace them all")
        return images.to(self.device), self.context(numbers)

    def context(self, numbers: list[int]) -> Tensor | None:
        """The classes of images by number, one-hot on the device; None without labels."""
        return None if self.labels is None else label_context(self.labels[numbers], self.classes).to(self.device)

    def read(self, index: list[int], replace: bool) -> tuple[list[int], Tensor, dict[int, str]]:
        """Read images by number.

        Args:
            replace: read the next readable image instead of an unreadable one, if ``on_bad`` is "skip"; otherwise
                leave it out.

        Returns:
            The numbers of the images read, (B,), these images, uint8 (B, *shape) on the CPU, and a mapping from the
            number of each unreadable image to the reason.
        """
        images, kept, problems = [], [], {}
        for number in index:
            tries = range(number, number + min(_TRIES, len(self))) if replace and self.on_bad == "skip" else (number,)
            for other in tries:
                other %= len(self)
                try:
                    images.append(self._decode(other))
                    kept.append(other)
                    break
                except Exception as error:  # PIL raises many kinds for a damaged file
                    problems[other] = " ".join(f"{type(error).__name__}: {error}".split())
        if not images:
            return [], torch.empty((0, *self.shape), dtype=torch.uint8), problems
        return kept, torch.from_numpy(np.stack(images)) >> self.shift, problems

    def _decode(self, number: int) -> np.ndarray:
        channels, *sides = self.shape
        with self.source.open(self.names[number]) as file:
            return decode(file, tuple(sides), channels, self.box, self.exact)

    def report(self, problems: dict[int, str]) -> None:
        """Raise FlowtrainError for the first of ``problems``, or with on_bad=skip record them and warn once."""
        for number, why in problems.items():
            line = f"cannot read {self.describe(number)}: {why}"
            if self.on_bad == "stop":
                raise FlowtrainError(f"{line}; on_bad=skip leaves it out")
            if not self.bad:
                log.warning("%s; on_bad=skip: it and others like it are left out", line)
            self.bad[number] = why
