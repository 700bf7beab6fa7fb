"""ImageNet downsampled to 32×32 or 64×64: two archives, resized in different ways, so two different datasets.

Bits/dim on one are not comparable with bits/dim on the other. The description of a split says which one it is.
"""

import pickle
from pathlib import Path

import numpy as np
import torch

from flowtrain.data.image_folders import ImageSet
from flowtrain.data.image_sources import find_images
from flowtrain.data.split import ArraySplit, Split, split_indices
from flowtrain.errors import FlowtrainError, UsageError

PIXELRNN = "PNG archive of van den Oord et al. 2016 (the older, of the PixelRNN, Real NVP and Glow papers)"
BATCHES = "npz/pickle batches of Chrabaszcz et al. 2017 (the newer; not comparable with the PNG archive)"


class DownsampledImageNet(ImageSet):
    """The PNG folders (or .tar files) ``train_32x32`` and ``valid_32x32``, or the newer batch files
    ``train_data_batch_1`` … ``_10`` and ``val_data`` (.npz files or pickles); the same for 64.

    They must be at ``dataset.path``, or in imagenet32 (imagenet64) under ``dataset.root``, or in ``dataset.root``
    itself. The validation images of the archives are the test split, as in the papers; val is chosen from train.
    PNG files stream from disk; batches are read into memory (16 GB for 64×64).
    """

    native_name = "imagenet"
    native_channels = 3
    default_size = 32
    default_val = 10_000
    exact = True

    def _choose_shape(self, image_size, channels):
        if image_size not in (None, 32, 64):
            self._refuse("image_size", image_size, f"must be 32 or 64 for {self.name}")
        return super()._choose_shape(image_size, channels)

    def _open(self, name: str) -> Split:
        size = self.spec.shape[-1]
        part = "test" if name == "test" else "train"
        folders = [self.path] if self.path else [self.root / f"imagenet{size}", self.root]
        stem = f"{'valid' if part == 'test' else 'train'}_{size}x{size}"
        found = []
        for folder in folders:
            png = next((p for p in (folder / stem, folder / f"{stem}.tar") if p.exists()), None)
            batches = _find_batches(folder, size, part)
            found += [png] if png else []
            found += [batches] if batches else []
            if found:
                break
        if not found:
            raise UsageError(
                f"dataset={self.name}: not found under {' or '.join(f'{f}/' for f in folders)}; put"
                f" {{train,valid}}_{size}x{size} (PNG folders or .tar) or {{train_data_batch_1..10,val_data}}[.npz]"
                " there, or give dataset.path=FOLDER"
            )
        if len(found) == 2:
            raise UsageError(
                f"dataset={self.name}: {folder} holds both the PNG archive and the newer batches, which are different"
                " data; keep them in separate folders and give dataset.path=FOLDER"
            )
        return self._open_png(name, found[0]) if isinstance(found[0], Path) else self._open_batches(name, found[0])

    def _open_png(self, name: str, path: Path) -> Split:
        images = find_images(path)
        if not images.names:
            raise UsageError(f"dataset={self.name}: {path} holds no images")
        names = images.names if name == "test" else self._split_names(images.names, name, 0)
        return self._make_split(name, images, names, PIXELRNN)

    def _open_batches(self, name: str, files: list[Path]) -> ArraySplit:
        dims = int(np.prod(self.spec.shape))
        parts = [_read_batch(file, dims) for file in files]
        total = sum(map(len, parts))
        wanted = np.ones(total, dtype=bool)
        if name != "test":
            wanted[:] = False
            wanted[split_indices(total, self.val_size, 0, self.split_seed)[name]] = True
        data = torch.empty((int(wanted.sum()), *self.spec.shape), dtype=torch.uint8)
        start = at = 0
        while parts:  # each is freed once it is copied: 64×64 fills 16 GB, and must not fill 32
            part = parts.pop(0)
            chosen = part[wanted[start : start + len(part)]]
            data[at : at + len(chosen)] = torch.from_numpy(chosen).view(-1, *self.spec.shape)
            start, at = start + len(part), at + len(chosen)
        data >>= self._dropped_bits
        return ArraySplit(data, f"{self.name} {name}: {len(data):,} images of {files[0].parent}, {BATCHES}")


def _find_batches(folder: Path, size: int, part: str) -> list[Path]:
    """The batch files of a part, in order, in ``folder`` or its Imagenet{size}_* folders, or []."""
    stems = ["val_data"] if part == "test" else [f"train_data_batch_{i}" for i in range(1, 11)]
    places = [folder, *sorted(folder.glob(f"Imagenet{size}_*"))]
    found = [
        next((p / f"{stem}{end}" for p in places for end in (".npz", "") if (p / f"{stem}{end}").is_file()), None)
        for stem in stems
    ]
    if any(found) and not all(found):
        missing = [stem for stem, file in zip(stems, found, strict=True) if file is None]
        raise UsageError(
            f"{folder} lacks {', '.join(missing)} (with .npz or without) of its {len(stems)} train batches"
        )
    return found if all(found) else []


def _read_batch(file: Path, dims: int) -> np.ndarray:
    """The images in a batch file, uint8 (N, dims), channels first. Raises FlowtrainError."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                data = archive["data"]
        else:
            with open(file, "rb") as stream:
                data = _ArraysOnly(stream, encoding="latin1").load()["data"]
    except Exception as error:  # libraries raise many kinds for a damaged file
        raise FlowtrainError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != dims:
        raise FlowtrainError(f"cannot read {file}: its data are not rows of {dims} bytes")
    return data


class _ArraysOnly(pickle.Unpickler):
    """Unpickle dictionaries, lists and numpy arrays only, so that a pickle can run no code."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return super().find_class("numpy._core.multiarray", name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not arrays only")
