"""Patches of photographs as a table of 63 columns, drawn as for BSDS300."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from flowtrain.data.dataset import SPLITS
from flowtrain.data.image_files import load_image
from flowtrain.data.image_sources import SUFFIXES, Source, find_images
from flowtrain.data.split import ArraySplit, split_indices
from flowtrain.data.vectors import Vectors
from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger(__name__)

SIDE = 8


class Patches(Vectors):
    """8×8 grey patches at random positions of the images at ``dataset.path``. Each pixel x of 256 levels becomes
    (x + u)/256 with uniform u, the mean of the patch is subtracted, and the last pixel, which is then minus the sum of
    the others, is dropped, as for BSDS300 (Papamakarios et al. 2017, appendix D).

    ``path`` is a folder, a .tar or a .zip of images. If it holds train and test, each a folder or an archive, the
    images are split that way and val patches come from the train images, as in BSDS300. Otherwise ``val_size`` and
    ``test_size`` split the images, not the patches.

    Args:
        train_patches, val_patches, test_patches: how many to draw for each split. All images are equally likely, and
            all positions in an image.
        split_seed: seed of the split, the positions and the noise.
    """

    native_name, dims = "bsds_patches", SIDE * SIDE - 1

    def __init__(self, *, train_patches=1_000_000, val_patches=50_000, test_patches=250_000, **keys):
        super().__init__(**keys)
        counts = {"train_patches": train_patches, "val_patches": val_patches, "test_patches": test_patches}
        self.counts = {key.removesuffix("_patches"): self._check_count(key, value) for key, value in counts.items()}

    def _open(self, name: str) -> ArraySplit:
        images, names = self._find_images(name)
        if not names:
            raise UsageError(f"dataset.path: {images.path} holds no images ({' '.join(SUFFIXES)})")
        random = np.random.default_rng([self.split_seed, SPLITS.index(name)])
        shares = random.multinomial(self.counts[name], np.full(len(names), 1 / len(names)))
        rows, at = np.empty((self.counts[name], self.dims), dtype=np.float32), 0
        bad = 0
        for image, share in zip(names, shares, strict=True):
            try:
                with images.open(image) as file:
                    grey = np.asarray(load_image(file, "L"))
                if min(grey.shape) < SIDE:
                    raise ValueError(
                        f"{grey.shape[1]}x{grey.shape[0]} pixels are smaller than a patch of {SIDE}x{SIDE}"
                    )
            except Exception as error:  # PIL raises many kinds for a damaged file
                bad += 1
                self._report(f"{images.location(image)}: {type(error).__name__}: {error}", bad)
                continue
            rows[at : at + share] = _draw_patches(grey, share, random)
            at += share
        if not at:
            raise FlowtrainError(f"dataset.path: none of the {len(names)} images of {images.path} can be read")
        how = f"of {SIDE}x{SIDE} patches from {len(names) - bad:,} images of {images.path}, drawn with seed"
        return self._make_split(
            name, rows[:at], f"{how} {self.split_seed} as for BSDS300: similar but not equal to its data"
        )

    def _find_images(self, name: str) -> tuple[Source, list[str]]:
        """The place of the images, and the names of those of a split."""
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs dataset.path=FOLDER of images (or a .zip or .tar of them)")
        if not self.path.exists():
            raise UsageError(f"dataset.path={self.path} does not exist: give a folder of images, or a .zip or .tar")
        own = {part: _split_path(self.path, part) for part in ("train", "test")}
        if all(own.values()):
            images = find_images(own["test" if name == "test" else "train"])
            return images, images.names
        images = find_images(self.path)
        if not images.names:
            return images, []
        chosen = split_indices(len(images.names), self.val_size, self.test_size, self.split_seed)[name]
        return images, [images.names[i] for i in np.sort(chosen)]

    def _report(self, problem: str, number: int) -> None:
        line = f"cannot read the image {' '.join(problem.split())}"
        if self.on_bad == "stop":
            raise FlowtrainError(f"{line}; on_bad=skip leaves it out")
        if number == 1:
            log.warning("%s; on_bad=skip: it and others like it are left out", line)


def _split_path(path: Path, part: str) -> Path | None:
    places = (path / f"{part}{end}" for end in ("", ".tar", ".zip"))
    return next((place for place in places if place.exists()), None)


def _draw_patches(grey: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Draw ``number`` patches of an image (H, W) as rows (number, 63)."""
    views = np.lib.stride_tricks.sliding_window_view(grey, (SIDE, SIDE))
    down, right = (random.integers(0, side, number) for side in views.shape[:2])
    x = views[down, right].reshape(number, SIDE * SIDE)
    y = (x + random.random(x.shape, dtype=np.float32)) / 256
    return (y - y.mean(1, keepdims=True))[:, :-1]
