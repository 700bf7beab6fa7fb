"""Datasets that are folders of images: a user's own, CelebA, CelebA-HQ. They stream from disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from flowtrain.data.image_files import ImageFileSplit
from flowtrain.data.image_sources import SUFFIXES, Source, expand_braces, find_images
from flowtrain.data.images import Images
from flowtrain.data.labels import number_classes, printable, sort_classes
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.data.split import split_indices
from flowtrain.errors import FlowtrainError, UsageError


class ImageSet(Images):
    """Base class of datasets that decode an image file each time an example is read."""

    box = None  # the crop (left, top, right, bottom); None: the largest centred square
    exact = False  # True: an image of another size is unreadable; False: it is resized

    def _make_split(self, name: str, images: Source, names: list[str], how: str, labels=None) -> ImageFileSplit:
        return ImageFileSplit(
            images,
            names,
            self.spec.shape,
            shift=self._dropped_bits,
            on_bad=self.on_bad,
            box=self.box,
            exact=self.exact,
            description=f"{self.name} {name}: {len(names):,} images of {printable(str(images.path))}, {how}",
            labels=labels,
            classes=self.spec.context.classes if self.spec.context else 0,
        )

    def _split_names(self, names: list[str], name: str, test: float | int) -> list[str]:
        return [names[i] for i in split_indices(len(names), self.val_size, test, self.split_seed)[name]]


class ImageFolder(ImageSet):
    """The images in a folder and its subfolders, a .zip, one or several .tar, or a column of a .parquet.

    A folder that holds "train" and also "test" or "val" (or "valid", "validation") is split that way. If one of the
    two is absent, a validation folder is the test split and val is chosen from train with ``split_seed``. Otherwise
    ``split_seed`` chooses both val and test.

    With ``context="label"`` the class of an image is the first folder by which the paths of the images differ, the text
    of its .cls in a .tar (the WebDataset format), or the label column of a .parquet. Classes are numbered in the order
    of their names.

    Args:
        labels: the label column of a .parquet; None: the one called label.
    """

    native_name = "image_folder"
    own_splits = ()
    has_labels = True
    default_val = default_test = 0.1

    def __init__(self, *, labels: str | None = None, **keys):
        super().__init__(**keys)
        self._check_type("labels", labels, str, "the name of a column")
        self.labels = labels

    @cached_property
    def spec(self) -> DataSpec:
        if self.context is None:
            return self._description
        names = tuple(self.find()["classes"])
        return replace(self._description, context=LabelContext(len(names), names))

    def find(self) -> dict | None:
        if self.context is None:
            return None
        if self.found is None:
            return self._findings
        classes = self.found.get("classes")
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise UsageError("dataset.found: the record of the classes is damaged")
        return self.found

    @cached_property
    def _findings(self) -> dict:
        """The names of the classes of the train images."""
        images = self._source("train")[0]
        classes = sort_classes(self._labels_of(images, images.names))
        if len(classes) < 2:
            raise UsageError(
                f"dataset.context=label: all images of {printable(str(images.path))} are of one class ({classes[0]})"
            )
        return {"classes": list(classes)}

    def _find_path(self) -> Path:
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs dataset.path=FOLDER of images (or a .zip, .tar or .parquet)")
        return self.path

    def _source(self, name: str) -> tuple[Source, bool]:
        """The images that a split consists of, or is chosen from, and whether it is all of them."""
        path = self._find_path()
        if not path.exists() and not expand_braces(path):
            raise UsageError(
                f"dataset.path={printable(str(path))} does not exist: give a folder of images, or a .zip, .tar or"
                " .parquet of them"
            )
        parts = self._parts
        own = name in parts and (name != "train" or "val" in parts)
        return self._find_images(parts[name] if own else parts.get("train", path)), own

    @property
    def _parts(self) -> dict[str, Path]:
        return _split_folders(self._find_path())

    def _open(self, name: str) -> ImageFileSplit:
        images, own = self._source(name)
        names, how = images.names, "a folder of their own"
        if not own:
            names = self._split_names(names, name, 0 if self._parts else self.test_size)
            how = f"cut with seed {self.split_seed}"
        labels = None
        if self.spec.context:
            texts = self._labels_of(images, names)
            labels = number_classes(texts, self.spec.context.names, f"dataset.path={printable(str(images.path))}")
        return self._make_split(name, images, names, how, labels)

    def _find_images(self, path: Path) -> Source:
        if path not in self._sources:
            self._sources[path] = find_images(path, self.labels)
        images = self._sources[path]
        if not images.names:
            raise UsageError(f"dataset.path: {printable(str(path))} holds no images ({' '.join(SUFFIXES)})")
        return images

    @cached_property
    def _sources(self) -> dict[Path, Source]:
        return {}

    def _labels_of(self, images: Source, names: Sequence[str]) -> list[str]:
        return image_labels(images, names, self._depth if images.labels is None else 0)

    @cached_property
    def _depth(self) -> int:
        """How many folders the train images have in common."""
        return common_folders(self._source("train")[0].names)


def common_folders(names: Sequence[str]) -> int:
    """How many of the folders at the start of their paths the images have in common."""
    return len([folder for folder in os.path.commonpath([f"/{name}/" for name in names]).split("/") if folder])


def image_labels(images: Source, names: Sequence[str], depth: int) -> list[str]:
    """The label of each image, as text: recorded by the file, or its folder number ``depth``.

    Raises:
        UsageError: an image has none; it is named.
    """
    if images.labels is not None:
        labels = [images.labels.get(name) for name in names]
    else:
        paths = [name.split("/") for name in names]
        labels = [printable(path[depth]) if len(path) > depth + 1 else None for path in paths]
    if None in labels:
        where = images.location(names[labels.index(None)])
        raise UsageError(
            f"dataset.context=label: {where} has no class: put the images into a folder for each class, or give each a"
            " .cls in a .tar, or a .parquet with a label column"
        )
    return labels


class CelebAHQ(ImageFolder):
    """CelebA-HQ: a folder of images at ``dataset.path``, or celeba_hq under ``dataset.root``."""

    native_name = "celebahq"
    default_size = 256

    def _find_path(self) -> Path:
        path = self.path or self.root / "celeba_hq"
        if not path.exists():
            raise UsageError(
                f"dataset={self.name}: {path} does not exist; put the images there (in train/ and valid/,"
                " or all together), or give dataset.path=FOLDER"
            )
        return path


class CelebA(ImageSet):
    """CelebA's aligned faces with the official splits, cropped to rows 40…187 and columns 15…162, then resized."""

    native_name = "celeba"
    own_splits = ("val", "test")
    default_val = None
    box = (15, 40, 163, 188)

    def _open(self, name: str) -> ImageFileSplit:
        path = self.path or self.root / "celeba"
        table = path / "list_eval_partition.txt"
        folder = next((p for p in (path / "img_align_celeba", path / "img_align_celeba.zip") if p.exists()), None)
        if folder is None or not table.is_file():
            raise UsageError(
                f"dataset={self.name}: not found under {path}/; put img_align_celeba/*.jpg (or img_align_celeba.zip)"
                " and list_eval_partition.txt there, or give dataset.path=FOLDER"
            )
        wanted = str(("train", "val", "test").index(name))
        try:
            rows = [line.split() for line in table.read_text().splitlines() if line.strip()]
            chosen = {file for file, part in rows if part == wanted}
        except (OSError, ValueError) as error:
            raise FlowtrainError(f"cannot read {table}: each line must be a file name and 0, 1 or 2") from error
        images = find_images(folder)
        names = [file for file in images.names if file.rpartition("/")[2] in chosen]
        if len(names) < len(chosen) or not names:
            raise UsageError(f"{folder} holds {len(names):,} of the {len(chosen):,} images of {table}'s {name} split")
        return self._make_split(name, images, names, f"the official split, crop {self.box}")


def _split_folders(path: Path) -> dict[str, Path]:
    """The folder of each split, if ``path`` holds train and at least one other; otherwise {}."""
    train, test = path / "train", path / "test"
    val = next((path / name for name in ("val", "valid", "validation") if (path / name).is_dir()), None)
    if not train.is_dir():
        return {}
    if test.is_dir():
        return {"train": train, "test": test} | ({"val": val} if val else {})
    return {"train": train, "test": val} if val else {}
