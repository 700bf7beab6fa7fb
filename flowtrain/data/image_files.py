"""Image files: listing them in a folder, a .zip or a .tar, decoding one, and a split of them."""

import hashlib
import io
import logging
import os
import tarfile
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowtrain.data.split import Split
from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
MAX_PIXELS = 64_000_000  # a larger image is unreadable: decoding it would take gigabytes
_TRIES = 100  # images to try in place of an unreadable one


class ListingTime:
    """The time at which a run listed its images."""

    SLACK = 2.0  # seconds of error allowed in a file server's clock

    def __init__(self):
        self.seconds = time.time()

    def check_unchanged(self, file: BinaryIO) -> BinaryIO:
        """Return ``file``, or raise ValueError if it was written since. A time in the future is ignored."""
        written = os.fstat(file.fileno()).st_mtime
        if self.seconds + self.SLACK < written < time.time() + self.SLACK:
            file.close()
            raise ValueError("it has changed since the run began")
        return file


class Folder:
    """The images under a folder, named by their relative paths, sorted."""

    def __init__(self, path: Path):
        self.path, self.listed_at, names, visited = path, ListingTime(), [], set()
        try:
            for here, folders, files in os.walk(path, followlinks=True, onerror=_raise):
                identity = os.stat(here).st_dev, os.stat(here).st_ino
                if identity in visited:  # a link to a parent folder
                    folders.clear()
                    continue
                visited.add(identity)
                names += [Path(here, file).relative_to(path).as_posix() for file in files if _is_image(file)]
        except OSError as error:
            raise FlowtrainError(f"cannot list {error.filename or path}: {error.strerror}") from error
        self.names = sorted(names)

    def location(self, name: str) -> str:
        return str(self.path / name)

    def open(self, name: str) -> BinaryIO:
        return self.listed_at.check_unchanged(open(self.path / name, "rb"))


class Zip:
    """The images in a .zip, read without unpacking it."""

    def __init__(self, path: Path):
        self.path, self.listed_at, self._archive, self._pid = path, ListingTime(), None, None
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = sorted(name for name in archive.namelist() if _is_image(name))
        except Exception as error:  # zipfile raises many kinds for a damaged archive
            raise FlowtrainError(f"cannot read {path}: {error}") from error

    def location(self, name: str) -> str:
        return f"{self.path}:{name}"

    def open(self, name: str) -> BinaryIO:
        if self._pid != os.getpid():  # a worker must not share its parent's file position
            self._archive, self._pid = zipfile.ZipFile(self.path), os.getpid()
        self.listed_at.check_unchanged(self._archive.fp)
        return self._archive.open(name)

    def __getstate__(self):
        return self.__dict__ | {"_archive": None, "_pid": None}


class Tar:
    """The images in an uncompressed .tar, read without unpacking it; a compressed one allows no random access."""

    def __init__(self, path: Path):
        self.path, self.listed_at = path, ListingTime()
        try:
            with tarfile.open(path, "r:") as archive:
                members = [member for member in archive if member.isfile() and _is_image(member.name)]
        except Exception as error:  # tarfile raises many kinds for a damaged archive
            raise FlowtrainError(f"cannot read {path} as an uncompressed .tar: {error}") from error
        self._places = {member.name: (member.offset_data, member.size) for member in members}
        self.names = sorted(self._places)

    def location(self, name: str) -> str:
        return f"{self.path}:{name}"

    def open(self, name: str) -> BinaryIO:
        offset, size = self._places[name]
        with open(self.path, "rb") as file:
            self.listed_at.check_unchanged(file).seek(offset)
            return io.BytesIO(file.read(size))


ImageSource = Folder | Zip | Tar


def find_images(path: Path) -> ImageSource:
    """List the images in a folder, a .zip or a .tar.

    Raises:
        UsageError: ``path`` is something else.
        FlowtrainError: it cannot be read.
    """
    if path.is_dir():
        return Folder(path)
    if path.suffix.lower() == ".zip":
        return Zip(path)
    if path.suffix.lower() == ".tar":
        return Tar(path)
    raise UsageError(f"{path} is neither a folder nor a .zip or .tar of images")


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
    """Whether a GIF has its final byte. The position in ``file`` stays."""
    place = file.tell()
    file.seek(0)
    whole = file.read().rstrip(b"\0").endswith(b";")
    file.seek(place)
    return whole


def decode(
    file: BinaryIO,
    size: int,
    channels: int,
    box: tuple[int, int, int, int] | None = None,
    exact: bool = False,
) -> np.ndarray:
    """Decode an image as uint8 (channels, size, size): grey for one channel, RGB for three.

    Args:
        box: the crop (left, top, right, bottom); None is the largest centred square. It is resized (bicubic,
            antialiased).
        exact: refuse an image of another size instead of resizing it.

    Raises:
        Exception: as :func:`load_image`.
    """
    image = load_image(file, "L" if channels == 1 else "RGB", (size, size) if exact else None)
    if box is None:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    if box[2] > image.width or box[3] > image.height:
        raise ValueError(f"{image.width}x{image.height} pixels are too few for the crop {box}")
    image = image.crop(box)  # before resizing, or pixels outside would blend into the border
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image).reshape(size, size, channels).transpose(2, 0, 1)


class ImageFileSplit(Split):
    """Images that are decoded from their files each time they are read.

    Args:
        source, names: the place of the images, and their names in it.
        shape: (channels, size, size) of one example.
        shift: how many of the 8 bits to drop, the least significant ones.
        on_bad: "stop" raises FlowtrainError at an unreadable image; "skip" reads the next readable one instead,
            records the problem in ``bad`` and warns once.
        box, exact: see :func:`decode`.
    """

    streams = True

    def __init__(
        self,
        source: ImageSource,
        names: Sequence[str],
        shape: tuple[int, int, int],
        shift: int = 0,
        on_bad: str = "stop",
        box: tuple[int, int, int, int] | None = None,
        exact: bool = False,
        description: str = "images",
    ):
        super().__init__(shape, description)
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

    def take(self, index: Tensor) -> tuple[Tensor, None]:
        _, images, problems = self.read(index.tolist(), replace=True)
        self.report(problems)
        if len(images) < len(index):
            raise FlowtrainError("too many unreadable images one after another to replace them all")
        return images.to(self.device), None

    def read(self, index: list[int], replace: bool) -> tuple[list[int], Tensor, dict[int, str]]:
        """Read images by number.

        Args:
            replace: read the next readable image instead of an unreadable one, if ``on_bad`` is "skip"; otherwise
                leave it out.

        Returns:
            The numbers read, (B,), the images, uint8 (B, *shape) on the CPU, and a mapping from the number of each
            unreadable image to the reason.
        """
        images, kept, problems = [], [], {}
        for number in index:
            tries = range(number, number + _TRIES) if replace and self.on_bad == "skip" else (number,)
            for other in tries:
                other %= len(self)
                try:
                    images.append(self._decode(other))
                    kept.append(number)
                    break
                except Exception as error:  # PIL raises many kinds for a damaged file
                    problems[other] = " ".join(f"{type(error).__name__}: {error}".split())
        if not images:
            return [], torch.empty((0, *self.shape), dtype=torch.uint8), problems
        return kept, torch.from_numpy(np.stack(images)) >> self.shift, problems

    def _decode(self, number: int) -> np.ndarray:
        channels, size, _ = self.shape
        with self.source.open(self.names[number]) as file:
            return decode(file, size, channels, self.box, self.exact)

    def report(self, problems: dict[int, str]) -> None:
        """Raise FlowtrainError for the first of ``problems``, or with on_bad=skip record them and warn once."""
        for number, why in problems.items():
            line = f"cannot read {self.describe(number)}: {why}"
            if self.on_bad == "stop":
                raise FlowtrainError(f"{line}; on_bad=skip leaves it out")
            if not self.bad:
                log.warning("%s; on_bad=skip: it and others like it are left out", line)
            self.bad[number] = why


def _is_image(name: str) -> bool:
    hidden = os.path.basename(name).startswith(".") or name.startswith("__MACOSX/")
    return name.lower().endswith(SUFFIXES) and not hidden


def _raise(error: OSError) -> None:
    raise error
