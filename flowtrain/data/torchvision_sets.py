"""Datasets that torchvision provides, in its file layout under ``dataset.root``."""

import hashlib
import math
import struct
import tarfile
from urllib.error import URLError

import torch
from torch import Tensor

from flowtrain.data.download import fetch, on_first_rank
from flowtrain.data.images import ArrayImages
from flowtrain.errors import FlowtrainError, UsageError


class TorchvisionImages(ArrayImages):
    """Base class: files under ``dataset.root`` are used, missing files are downloaded if that is allowed."""

    torchvision_class: str
    default_val = 5000
    classes = 10

    def _files(self, part: str) -> list[str]:
        """The files of "train" or "test" that torchvision needs, relative to ``dataset.root``."""
        raise NotImplementedError

    def _describe_files(self) -> str:
        """All files, abbreviated for a message."""
        raise NotImplementedError

    def _build(self, root: str, part: str, download: bool):
        import torchvision

        return getattr(torchvision.datasets, self.torchvision_class)(root, train=part == "train", download=download)

    def _labels(self, found):
        return found.targets

    def _md5_sums(self) -> dict[str, str]:
        """The known MD5 sums: file -> hexadecimal digest."""
        return {}

    def _damage(self, file: str) -> str | None:
        """What is wrong with a file, or None if nothing can be found."""
        expected = self._md5_sums().get(file)
        found = expected and hashlib.md5((self.root / file).read_bytes(), usedforsecurity=False).hexdigest()
        return None if found == expected else f"the MD5 of {self.root / file} is {found}, not {expected}"

    def _load(self, part: str) -> tuple[Tensor, Tensor, str]:
        on_first_rank(lambda: self._fetch(part))
        if not self._is_complete(part):  # process 0 has them on the disk of another machine
            raise UsageError(
                self._missing_message(part, "the first process has them; share dataset.root between machines")
            )
        try:
            found = self._build(str(self.root), part, download=False)
            data, labels = found.data, self._labels(found)
        except Exception as error:  # torchvision raises many kinds for a damaged file
            found = [damage for file in self._files(part) if (damage := self._damage(file))]
            what = found[0] if found else f"files under {self.root}: {_one_line(error)}"
            raise FlowtrainError(
                f"dataset={self.name}: damaged: {what}; remove {self._describe_files()} and get them again"
            ) from error
        data, labels = torch.as_tensor(data), torch.as_tensor(labels).long()  # MNIST has tensors already
        if data.dim() == 3:
            data = data[:, None]
        elif data.shape[-1] == 3:
            data = data.permute(0, 3, 1, 2).contiguous()
        if tuple(data.shape[1:]) != self.spec.shape:
            raise FlowtrainError(f"dataset={self.name}: files under {self.root} hold shapes {list(data.shape[1:])}")
        return data, labels, f"from {self.root}"

    def _is_complete(self, part: str) -> bool:
        return all((self.root / file).is_file() for file in self._files(part))

    def _missing_message(self, part: str, why: str) -> str:
        return f"dataset={self.name}: not found under {self.root}/; put {self._describe_files()} there ({why})"

    def _fetch(self, part: str) -> None:
        if self._is_complete(part):
            return
        if not self.download:
            raise UsageError(self._missing_message(part, "dataset.download=false"))
        absent = [file for file in self._files(part) if not (self.root / file).is_file()]
        try:
            fetch(self.root, absent, lambda folder: self._build(folder, part, download=True))
        except (RuntimeError, OSError, URLError, EOFError, tarfile.TarError) as error:
            raise UsageError(self._missing_message(part, f"downloading failed: {_one_line(error)}")) from error


class MNIST(TorchvisionImages):
    """Handwritten digits, 60,000 + 10,000, grey 28×28."""

    native_name, torchvision_class = "mnist", "MNIST"
    native_size, native_channels = 28, 1

    def _files(self, part: str) -> list[str]:
        kinds = ("images-idx3", "labels-idx1")
        return [f"{self.torchvision_class}/raw/{p}-{kind}-ubyte" for p in ("train", "t10k") for kind in kinds]

    def _damage(self, file: str) -> str | None:
        with open(self.root / file, "rb") as stream:
            head = stream.read(16)
        count = head[3] if len(head) > 3 else 0  # number of dimensions, whose sizes follow
        if not 1 <= count <= 3 or len(head) < 4 + 4 * count:
            return f"{self.root / file} has no header"
        sides = struct.unpack_from(f">{count}I", head, 4)
        size, expected = (self.root / file).stat().st_size, 4 + 4 * count + math.prod(sides)
        return None if size == expected else f"{self.root / file} has {size:,} bytes instead of {expected:,}"

    def _describe_files(self) -> str:
        return f"{self.torchvision_class}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte"


class FashionMNIST(MNIST):
    """Clothes, in the format of MNIST."""

    native_name, torchvision_class = "fashion_mnist", "FashionMNIST"


class KMNIST(MNIST):
    """Cursive Japanese characters, in the format of MNIST."""

    native_name, torchvision_class = "kmnist", "KMNIST"


class CIFAR10(TorchvisionImages):
    """Small photographs of ten classes, 50,000 + 10,000, RGB 32×32. All seven files are checked by digest."""

    native_name, torchvision_class = "cifar10", "CIFAR10"
    native_size, native_channels = 32, 3

    def _files(self, part: str) -> list[str]:
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
        return [f"cifar-10-batches-py/{name}" for name in names]

    def _md5_sums(self) -> dict[str, str]:
        from torchvision.datasets import CIFAR10 as Theirs

        sums = [*Theirs.train_list, *Theirs.test_list, (Theirs.meta["filename"], Theirs.meta["md5"])]
        return {f"cifar-10-batches-py/{name}": md5 for name, md5 in sums}

    def _describe_files(self) -> str:
        return "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"


class SVHN(TorchvisionImages):
    """House numbers, 73,257 + 26,032 (without "extra"), RGB 32×32. Each file is checked by digest."""

    native_name, torchvision_class = "svhn", "SVHN"
    native_size, native_channels = 32, 3

    def _files(self, part: str) -> list[str]:
        return [f"{part}_32x32.mat"]

    def _md5_sums(self) -> dict[str, str]:
        from torchvision.datasets import SVHN as Theirs

        return {name: md5 for _, name, md5 in Theirs.split_list.values()}

    def _describe_files(self) -> str:
        return "{train,test}_32x32.mat"

    def _build(self, root: str, part: str, download: bool):
        import torchvision

        return torchvision.datasets.SVHN(root, split=part, download=download)

    def _labels(self, found):
        return found.labels


def _one_line(error: Exception) -> str:
    """The text of an error on one line of at most 160 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "…"
