"""The five tables on which density estimators are compared since MAF, prepared as by its authors (Papamakarios et al.
2017, appendix D; github.com/gpapamak/maf). Figures are nats per row of standardized data.

Each is read from the file that the authors publish (zenodo.org/records/1161203), or from NAME.npy, which holds the
prepared train, val and test splits one after another (github.com/francois-rozet/uci-datasets).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flowtrain.data import pickled_frames
from flowtrain.data.dataset import SPLITS
from flowtrain.data.split import ArraySplit
from flowtrain.data.vectors import Vectors
from flowtrain.errors import FlowtrainError, UsageError

Parts = dict[str, np.ndarray]  # split -> rows (N, D)


class MafTable(Vectors):
    """Base class of the five tables. The splits are those of the files; a split's description says if its number of
    rows is not the published one."""

    own_splits = ("val", "test")
    default_val = default_test = None
    file: str  # of the authors, under their folder data/
    sizes: tuple[int, int, int]  # published number of rows of each split

    def __init__(self, **keys):
        super().__init__(**keys)
        self._prepared: tuple[Path, Parts] | None = None

    def _prepare(self, file: Path) -> Parts:
        """Read and prepare the authors' file."""
        raise NotImplementedError

    def _open(self, name: str) -> ArraySplit:
        if self._prepared is None:
            file, prepare = self._find()
            try:
                with np.errstate(all="ignore"):  # overflows are refused below
                    parts = prepare(file)
            except ModuleNotFoundError as error:
                raise UsageError(f"dataset={self.name} needs more packages: pip install 'flowtrain[tables]'") from error
            except FlowtrainError:
                raise
            except Exception as error:  # libraries raise many kinds for a damaged file
                raise FlowtrainError(f"cannot read {file}: {' '.join(str(error).split())}") from error
            self._prepared = file, parts
        file, parts = self._prepared
        rows = parts[name]
        if rows.shape[1] != self.dims:
            raise FlowtrainError(f"{file} gives rows of {rows.shape[1]} numbers; {self.name} has {self.dims}")
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            raise FlowtrainError(f"{file}: prepared, row {int(finite.argmin()) + 1} of its {name} split is not finite")
        published = self.sizes[SPLITS.index(name)]
        same = "prepared as for MAF" if len(rows) == published else f"not MAF's {published:,}"
        return self._make_split(name, rows, f"of {file}, {same}")

    def _find(self) -> tuple[Path, Callable[[Path], Parts]]:
        whole = f"{type(self).__name__.upper()}.npy"
        if self.path is not None and self.path.is_file():
            return self.path, self._load_prepared if self.path.name.upper() == whole.upper() else self._prepare
        folder = self.path or self.root
        places = [folder / self.file] + ([folder / Path(self.file).name] if self.path else [])
        for file in (*places, folder / whole):
            if file.is_file():
                return file, self._load_prepared if file.name == whole else self._prepare
        raise UsageError(
            f"dataset={self.name}: neither {self.file} nor {whole} is under {folder}/; get the first from"
            " zenodo.org/records/1161203 (data.tar.gz) and put it there, or give dataset.path=FILE"
        )

    def _load_prepared(self, file: Path) -> Parts:
        """Read NAME.npy: prepared rows of train, val and test one after another."""
        rows = np.load(file, allow_pickle=False)
        if rows.ndim != 2 or len(rows) != sum(self.sizes):
            raise ValueError(f"it holds {list(rows.shape)}, not the {sum(self.sizes):,} rows of three splits")
        cuts = np.cumsum(self.sizes)[:2]
        return dict(zip(SPLITS, np.split(rows.astype(np.float32, copy=False), cuts), strict=True))


class Power(MafTable):
    """POWER: electric power of a household by the minute, 6 columns, with uniform noise of each meter's resolution."""

    native_name, dims = "power", 6
    names = ("active_power", "voltage", "sub_metering_1", "sub_metering_2", "sub_metering_3", "time")
    file, sizes = "power/data.npy", (1_659_917, 184_435, 204_928)

    def _prepare(self, file: Path) -> Parts:
        rows = np.load(file, allow_pickle=False)
        random = np.random.RandomState(42)
        rows = rows[random.permutation(len(rows))]  # the same order as shuffle(), faster
        rows = np.delete(rows, [1, 3], axis=1)
        n = len(rows)
        voltage, active, meters = 0.01 * random.rand(n, 1), 0.001 * random.rand(n, 1), random.rand(n, 3)
        rows = rows + np.hstack((active, voltage, meters, np.zeros((n, 1))))
        return _split_tenths(rows, standardize=True)


class Gas(MafTable):
    """GAS: 8 of 16 sensors in a changing mixture of gases. Of sensors whose correlation exceeds 0.98, one stays."""

    native_name, dims = "gas", 8
    file, sizes = "gas/ethylene_CO.pickle", (852_174, 94_685, 105_206)

    def _prepare(self, file: Path) -> Parts:
        rows = pickled_frames.read(file).drop(columns=["Meth", "Eth", "Time"]).to_numpy(dtype=np.float64)
        alike = np.corrcoef(rows, rowvar=False) > 0.98
        kept = np.arange(len(alike))
        while (several := alike[np.ix_(kept, kept)].sum(1) > 1).any():  # each correlates with itself
            kept = np.delete(kept, several.argmax())
        rows = rows[:, kept]
        return _split_tenths((rows - rows.mean(0)) / rows.std(0, ddof=1))


class Hepmass(MafTable):
    """HEPMASS: particle collisions that produced a new particle, 21 columns. Discrete columns are left out."""

    native_name, dims = "hepmass", 21
    file, sizes = "hepmass/1000_train.csv", (315_123, 35_013, 174_987)

    def _prepare(self, file: Path) -> Parts:
        test_file = file.with_name(file.name.replace("train", "test"))
        if test_file == file or not test_file.is_file():
            raise UsageError(f"dataset={self.name}: 1000_train.csv and 1000_test.csv must be in one folder; see {file}")
        train, test = _read_signal(file), _read_signal(test_file)[:, :-1]  # the test file has one column more
        if train.shape[1] != test.shape[1]:
            raise ValueError(f"it has {train.shape[1]} columns, and {test_file.name} should have one more")
        mean, std = train.mean(0), train.std(0, ddof=1)
        train, test = (train - mean) / std, (test - mean) / std
        continuous = _continuous_columns(train)
        train, test = train[:, continuous], test[:, continuous]
        train, val = np.split(train, [len(train) - int(0.1 * len(train))])
        return _to_float32({"train": train, "val": val, "test": test})


class Miniboone(MafTable):
    """MINIBOONE: electron neutrinos in a detector, 43 columns. Outliers and discrete columns are left out."""

    native_name, dims = "miniboone", 43
    file, sizes = "miniboone/data.npy", (29_556, 3_284, 3_648)

    def _prepare(self, file: Path) -> Parts:
        rows = np.load(file, allow_pickle=False)
        if rows.shape[1] != self.dims:  # the authors' file has the 43 columns already
            rows = rows[rows[:, 0] >= -100]
            rows = rows[:, _continuous_columns(rows)]
        return _split_tenths(rows, standardize=True)


class BSDS300(MafTable):
    """BSDS300: 8×8 grey patches of photographs minus their mean, without the last pixel: 63 columns."""

    native_name, dims = "bsds300", 63
    file, sizes = "BSDS300/BSDS300.hdf5", (1_000_000, 50_000, 250_000)

    def _prepare(self, file: Path) -> Parts:
        import h5py

        with h5py.File(file) as archive:
            return _to_float32(
                {"train": archive["train"][:], "val": archive["validation"][:], "test": archive["test"][:]}
            )


def _split_tenths(rows: np.ndarray, standardize: bool = False) -> Parts:
    """Split rows (N, D): the last tenth is test, the last tenth of the rest is val. ``standardize`` uses the moments
    of train and val together."""
    tests = int(0.1 * len(rows))
    vals = int(0.1 * (len(rows) - tests))
    if standardize:
        fit = rows[: len(rows) - tests]
        rows = (rows - fit.mean(0)) / fit.std(0)
    train, val, test = np.split(rows, [len(rows) - tests - vals, len(rows) - tests])
    return _to_float32({"train": train, "val": val, "test": test})


def _to_float32(parts: Parts) -> Parts:
    return {name: np.ascontiguousarray(rows, dtype=np.float32) for name, rows in parts.items()}


def _continuous_columns(rows: np.ndarray) -> np.ndarray:
    """Which columns are continuous: their least value occurs at most five times."""
    return (rows == rows.min(0)).sum(0) <= 5


def _read_signal(file: Path) -> np.ndarray:
    """The rows of HEPMASS with label 1, without the label. Columns are taken by position, since the names in the first
    line are wrong."""
    import pandas as pd

    rows = pd.read_csv(file, header=None, skiprows=1, dtype=np.float64).to_numpy()
    return rows[rows[:, 0] == 1, 1:]
