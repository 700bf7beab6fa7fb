"""Datasets that are folders of images: a user's own, CelebA, CelebA-HQ. They stream from disk."""

from pathlib import Path

from flowtrain.data.image_files import SUFFIXES, ImageFileSplit, ImageSource, find_images
from flowtrain.data.images import Images
from flowtrain.data.split import split_indices
from flowtrain.errors import FlowtrainError, UsageError


class ImageSet(Images):
    """Base class of datasets that decode an image file each time an example is read."""

    box = None  # the crop (left, top, right, bottom); None: the largest centred square
    exact = False  # True: an image of another size is unreadable; False: it is resized

    def _make_split(self, name: str, images: ImageSource, names: list[str], how: str) -> ImageFileSplit:
        return ImageFileSplit(
            images,
            names,
            self.spec.shape,
            shift=self._dropped_bits,
            on_bad=self.on_bad,
            box=self.box,
            exact=self.exact,
            description=f"{self.name} {name}: {len(names):,} images of {images.path}, {how}",
        )

    def _split_names(self, names: list[str], name: str, test: float | int) -> list[str]:
        return [names[i] for i in split_indices(len(names), self.val_size, test, self.split_seed)[name]]


class ImageFolder(ImageSet):
    """The images in a folder and its subfolders, in a .zip or in a .tar.

    A folder that holds "train" and also "test" or "val" (or "valid", "validation") is split that way. If one of the
    two is absent, a validation folder is the test split and val is chosen from train with ``split_seed``. Otherwise
    ``split_seed`` chooses both val and test.
    """

    native_name = "image_folder"
    own_splits = ()
    default_val = default_test = 0.1

    def _find_path(self) -> Path:
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs dataset.path=FOLDER of images (or a .zip or .tar of them)")
        return self.path

    def _open(self, name: str) -> ImageFileSplit:
        path = self._find_path()
        if not path.exists():
            raise UsageError(f"dataset.path={path} does not exist: give a folder of images, or a .zip or .tar of them")
        parts = _split_folders(path)
        if name in parts and (name != "train" or "val" in parts):
            images = self._find_images(parts[name])
            return self._make_split(name, images, images.names, "a folder of their own")
        images = self._find_images(parts.get("train", path))
        names = self._split_names(images.names, name, 0 if parts else self.test_size)
        return self._make_split(name, images, names, f"cut with seed {self.split_seed}")

    def _find_images(self, path: Path) -> ImageSource:
        images = find_images(path)
        if not images.names:
            raise UsageError(f"dataset.path: {path} holds no images ({' '.join(SUFFIXES)})")
        return images


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
