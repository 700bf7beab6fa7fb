"""The base class of all datasets: the keys that their YAML files share, checked, and three splits."""

import os
from collections.abc import Callable
from pathlib import Path

from flowtrain.data.spec import DataSpec
from flowtrain.data.split import Split
from flowtrain.errors import UsageError

SPLITS = ("train", "val", "test")
COUNT_OR_FRACTION = "a number of examples, at least 1, or a fraction below 1"


class Dataset:
    """Data with a description and three splits. The constructor opens no file; :meth:`split` does.

    Args:
        name: its name in messages.
        root: the folder of all data, into which downloads go.
        path: the folder or file of this dataset, if it is not under ``root``.
        download: whether missing files may be downloaded.
        val_size, test_size: number or fraction of the examples that form this split; None if the files have one.
        split_seed: seed of the random permutation that chooses them.
        on_bad: "stop" or "skip" at an unreadable image.
        found: what :meth:`find` returned when a checkpoint was written: the description then needs no file.

    Attributes:
        spec: the description, known before the data are loaded. No file is opened for it, except by a user's table,
            arrays or labelled images, of which the headers or names are read: UsageError or FlowtrainError where that
            cannot be done.

    Raises:
        UsageError: a key has a wrong value; it is named.
    """

    spec: DataSpec

    native_name: str
    own_splits: tuple[str, ...] = ()  # splits besides train that the files already have
    uses_path = uses_root = True
    default_val: float | int | None = 0.1
    default_test: float | int | None = None
    augment = None  # for the train split's Loader

    def __init__(
        self,
        *,
        name: str | None = None,
        root: str = "data",
        path: str | None = None,
        download: bool = True,
        val_size: float | int | None = None,
        test_size: float | int | None = None,
        split_seed: int = 0,
        on_bad: str = "stop",
        found: dict | None = None,
    ):
        self._check_type("download", download, bool, "true or false")
        self._check_type("split_seed", split_seed, int, "a whole number of at least 0")
        if split_seed is None or split_seed < 0:
            self._refuse("split_seed", split_seed, "must be a whole number of at least 0")
        self.name = name or self.native_name
        self.root = Path(os.path.expanduser(root))
        self.path = None if path is None else Path(os.path.expanduser(path))
        self.download, self.split_seed, self.on_bad = download, split_seed, on_bad
        self.found = found
        self.val_size = self.default_val if val_size is None else val_size
        self.test_size = self.default_test if test_size is None else test_size

        if path is not None and not self.uses_path:
            self._refuse("path", path, f"{self.name} has none; its files, if any, are under dataset.root")
        if self.path is not None and not _may_be_read(self.path):
            self._refuse("path", path, "must be a file or a folder")
        if on_bad not in ("stop", "skip"):
            raise UsageError(f"on_bad={on_bad}: must be stop or skip")
        for part, size in (("val", self.val_size), ("test", self.test_size)):
            self._check_type(f"{part}_size", size, (int, float), COUNT_OR_FRACTION)
            if part in self.own_splits and size is not None:
                self._refuse(f"{part}_size", size, f"{self.name} has its own {part} split; leave it null")
            if part not in self.own_splits and not (0 < size < 1 or (size >= 1 and size == int(size))):
                self._refuse(f"{part}_size", size, f"must be {COUNT_OR_FRACTION}")

    def split(self, name: str) -> Split:
        """Open "train", "val" or "test". Every process must call this, since the first one downloads for all.

        Raises:
            UsageError: files are missing.
            FlowtrainError: files cannot be read.
        """
        if name not in SPLITS:
            raise UsageError(f"split={name}: must be one of {', '.join(SPLITS)}")
        return self._open(name)

    def find(self) -> dict | None:
        """What the files decide of the description, as plain data for a checkpoint; None: nothing."""
        return None

    def use_columns(self, columns) -> None:
        """Encode rows by the columns of a checkpoint (a :class:`Columns`) instead of those found in the file. Call it
        before :meth:`split`. Only a user's table uses it."""

    def use_functions(self, find: Callable[[str, str], Callable]) -> None:
        """Find functions of the user's own by ``find(key, "module:function")``. Only a simulator has any."""

    def _open(self, name: str) -> Split:
        raise NotImplementedError

    def _check_type(self, key, value, kind, words) -> None:
        """Refuse a value that is not None and not of type ``kind``; ``words`` describe what it must be."""
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            self._refuse(key, value, f"must be {words}")

    def _refuse(self, key, value, why) -> None:
        raise UsageError(f"dataset.{key}={value}: {why}")


def _may_be_read(path: Path) -> bool:
    """Whether it is a file or a folder, or there is nothing; not a pipe, which blocks, or a name that is too long."""
    try:
        return path.is_file() or path.is_dir() or not path.exists()
    except OSError:
        return False
