"""A user's own arrays: integers are images, real numbers are fields of one or two dimensions."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.array_context import ArrayContext
from flowtrain.data.array_files import Rows, arrange, event_shape, find_layout, open_rows
from flowtrain.data.augment import Augmented
from flowtrain.data.labels import label_context, number_classes, printable, sort_classes
from flowtrain.data.spec import DataSpec, LabelContext
from flowtrain.data.split import DIGEST_BYTES, ArraySplit, Split, split_indices
from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger(__name__)

LAYOUTS = ("NL", "NHW", "NHWC", "NCHW", "L", "HW", "HWC", "CHW")
HELD_BYTES = 2**30  # of the numbers of a split: it is held in memory up to here, and read batch by batch above
MOST_EXAMPLES = 2**27  # their order takes 8 bytes each
MOST_LEVELS = 2**22  # up to here float32 distinguishes x from x + ½


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a file become those of a flow.

    Attributes:
        layout: of the file's axes: NL, NHW, NHWC or NCHW.
        grey_levels: of integers; None: real numbers.
        dropped_bits: of integers, how many of the last bits are dropped.
    """

    layout: str
    grey_levels: int | None
    dropped_bits: int = 0

    def convert(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Rows (N, …) as uint8, int32 or float32 (N, C, H, W) or (N, L), and which of them cannot be used, (N,)."""
        rows = arrange(rows, self.layout)
        axes = tuple(range(1, rows.ndim))
        if self.grey_levels is None:
            with np.errstate(over="ignore"):  # too large for float32: not finite, and refused
                rows = rows.astype(np.float32)
            good = np.isfinite(rows).all(axes)
            return torch.from_numpy(np.ascontiguousarray(rows)), ~good
        if self.dropped_bits:
            rows = rows >> self.dropped_bits
        good = (rows >= 0) & (rows < self.grey_levels)
        if rows.dtype.kind == "f":
            good &= rows == np.floor(rows)
        good = good.all(axes)
        if not good.all():
            rows = np.where(good.reshape(-1, *[1] * len(axes)), rows, 0)
        rows = rows.astype(np.uint8 if self.grey_levels <= 256 else np.int32)
        return torch.from_numpy(np.ascontiguousarray(rows)), ~good

    def fault(self) -> str:
        """What is wrong with a row that cannot be used."""
        if self.grey_levels is None:
            return "holds NaN, an infinite number or one too large for float32"
        top = (self.grey_levels << self.dropped_bits) - 1
        return f"holds values outside the whole numbers 0 … {top}"


class ArrayFileSplit(Split):
    """Rows of an array that are read from their file each time they are taken.

    Args:
        numbers: of the rows that form this split, (N,).
        context: of these rows, (N, …), or None.
    """

    def __init__(
        self, rows: Rows, numbers: np.ndarray, values: Numbers, description: str, context: Tensor | None = None
    ):
        super().__init__(event_shape(rows.shape, values.layout), description)
        self.rows, self.numbers, self.values, self.context = rows, numbers, values, context
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        numbers = self.numbers[index.cpu().numpy()]
        x, bad = self.values.convert(self.rows.take(numbers))
        refuse_bad(self.rows, numbers, bad, self.values)
        context = None if self.context is None else self.context[index.cpu()].to(self.device)
        return x.to(self.device), context

    def to(self, device) -> ArrayFileSplit:
        self.device = torch.device(device)
        return self

    def digest(self) -> str:
        """SHA-256 of the rows' numbers and of evenly spaced rows, at most 64 MiB."""
        digest = hashlib.sha256(np.ascontiguousarray(self.numbers))
        each = max(1, self.rows.dtype.itemsize * int(np.prod(self.shape)))
        step = -(-len(self) // max(1, min(256, DIGEST_BYTES // each)))
        digest.update(np.ascontiguousarray(self.rows.take(self.numbers[::step])))
        return digest.hexdigest()


class Arrays(Augmented):
    """The examples in an .npy, .npz, .h5 or .zarr, or in the .npy files of a folder.

    Axes are (N, height, width), (N, height, width, channels) or (N, channels, height, width) of images, (N, length) of
    vectors. Integers are images with their grey levels. Real numbers are fields: continuous, in their own units. A
    split of more than 1 GiB is read from the file batch by batch.

    Args:
        key: the array's name in an .npz, .h5 or .zarr; None: the only one of two or more dimensions.
        layout: one of NL, NHW, NHWC, NCHW, or without N for a folder of files of one example each; None: found.
        grey_levels: of integers; None: 256 for uint8, otherwise the power of two above the largest. With it, whole
            numbers may be stored as real ones.
        bits: how many of the 8 bits of uint8, or the 16 of uint16, to keep.
        labels: the name of the array of labels, (N,), whole numbers or text.
        context: "label": each example comes with its class as a one-hot vector; or the name of an array (N, …) of
            numbers, such as images: each example comes with its own, see :class:`ArrayContext`.
        common: see :class:`Augmented`.
    """

    native_name = "arrays"
    default_val = default_test = 0.1

    def __init__(
        self,
        *,
        key: str | None = None,
        layout: str | None = None,
        grey_levels: int | None = None,
        bits: int | None = None,
        labels: str | None = None,
        context: str | None = None,
        **common,
    ):
        super().__init__(**common)
        if self.found is not None:
            _check_found(self.found)
        for name, value in (("key", key), ("labels", labels)):
            self._check_type(name, value, str, "the name of an array in the file")
        self._check_type("grey_levels", grey_levels, int, "a whole number of at least 2")
        self._check_type("bits", bits, int, "a number from 1 to 16")
        if layout is not None and layout not in LAYOUTS:
            self._refuse("layout", layout, f"must be one of {', '.join(LAYOUTS)}")
        if grey_levels is not None and not 2 <= grey_levels <= MOST_LEVELS:
            self._refuse("grey_levels", grey_levels, f"must be between 2 and {MOST_LEVELS:,}")
        if bits is not None and not 1 <= bits <= 16:
            self._refuse("bits", bits, "must be between 1 and 16")
        if bits is not None and grey_levels is not None:
            self._refuse("bits", bits, "with grey_levels it says the same twice; leave one null")
        self._check_type("context", context, str, "label, the name of an array in the file, or null")
        if (context == "label") != (labels is not None):
            key, value = ("context", context) if labels is None else ("labels", labels)
            self._refuse(key, value, "labels are the context: give dataset.labels=NAME and dataset.context=label")
        self.key, self.layout, self.grey_levels, self.bits = key, layout, grey_levels, bits
        self.labels, self.context = labels, context

    @cached_property
    def spec(self) -> DataSpec:
        found = self.find()
        shape, names = tuple(found["shape"]), tuple(found["classes"])
        self._check_augmentation(shape, self.context == "label")
        context = None
        if self.context == "label":
            context = LabelContext(len(names), names)
        elif self.context:
            context = ArrayContext.from_record(found.get("context"))
        return DataSpec(self.name, shape, found["grey_levels"], context)

    def find(self) -> dict:
        return self.found or self._findings

    @cached_property
    def _findings(self) -> dict:
        """The shape, layout and numbers of the array, and the names of its classes."""
        rows = self._rows
        layout = find_layout(rows.shape, rows.path, self.layout)
        grey_levels, dropped = self._find_levels(rows)
        classes = sort_classes(self._read_labels()) if self.labels else ()
        return {
            "shape": list(event_shape(rows.shape, layout)),
            "layout": layout,
            "grey_levels": grey_levels,
            "dropped_bits": dropped,
            "classes": list(classes),
            **({"context": ArrayContext.of(self.context, self._contexts).to_record()} if self._has_array else {}),
        }

    @property
    def _has_array(self) -> bool:
        return self.context not in (None, "label")

    @cached_property
    def _contexts(self) -> Rows:
        """The array that is the context."""
        rows = open_rows(self.path, self.context)
        if len(rows) != len(self._rows):
            self._refuse("context", self.context, f"{list(rows.shape)} for an array of {list(self._rows.shape)}")
        return rows

    @cached_property
    def _rows(self) -> Rows:
        if self.path is None:
            raise UsageError(
                f"dataset={self.name} needs dataset.path=FILE (.npy, .npz, .h5, .zarr) or a folder of .npy"
            )
        if not self.path.exists():
            raise UsageError(f"dataset.path={self.path}: no such file or folder")
        rows = open_rows(self.path, self.key, self.layout)
        if rows.shape and len(rows) > MOST_EXAMPLES:
            raise UsageError(f"{self.path} holds {len(rows):,} examples, more than {MOST_EXAMPLES:,}")
        return rows

    @cached_property
    def _numbers(self) -> Numbers:
        return self.numbers_of(self._rows)

    def numbers_of(self, rows: Rows) -> Numbers:
        """How the numbers of an array are read, which may be another file than that of the checkpoint. Raises
        UsageError where they are not those of this data set."""
        found, layout = self.find(), self.layout
        if layout is None and len(rows.shape) == len(found["layout"]):
            same = event_shape(rows.shape, found["layout"]) == self.spec.shape
            layout = found["layout"] if same else None
        return fit_numbers(rows, self.spec, layout, found["dropped_bits"], self.grey_levels is not None)

    def _find_levels(self, rows: Rows) -> tuple[int | None, int]:
        """The number of grey levels, None for real numbers; and how many of the last bits to drop."""
        kind, where = rows.dtype.kind, f"{rows.path} holds {rows.dtype}"
        if kind not in "fiub":
            raise UsageError(f"{where}: must be integers or real numbers")
        if kind == "f" and self.grey_levels is None:
            if self.bits is not None:
                self._refuse("bits", self.bits, f"{where}: real numbers have no grey levels")
            return None, 0
        if self.grey_levels is not None:
            return self.grey_levels, 0
        if kind == "b":
            return 2, 0
        width = {"uint8": 8, "uint16": 16}.get(rows.dtype.name)
        if width is None or width == 16 and self.bits is None:
            width = self._needed_bits(rows)
        if self.bits is not None and self.bits > width:
            self._refuse("bits", self.bits, f"{where} of {width} bits")
        bits = width if self.bits is None else self.bits
        return 2**bits, width - bits

    def _needed_bits(self, rows: Rows) -> int:
        """The bits of the largest number of the file."""
        stat = rows.path.stat()
        least, greatest = _extremes(self.path, self.key, self.layout, stat.st_mtime_ns, stat.st_size)
        if least < 0:
            raise UsageError(
                f"{rows.path} holds {least}: integers are grey levels from 0; write a field as real numbers"
            )
        bits = max(1, greatest.bit_length())
        if 2**bits > MOST_LEVELS:
            raise UsageError(
                f"{rows.path} holds integers up to {greatest:,}, more than {MOST_LEVELS:,} grey levels; write a field"
                " as real numbers"
            )
        log.info("%s: integers from %d to %d, so %s grey levels", rows.path, least, greatest, f"{2**bits:,}")
        return bits

    def _read_labels(self) -> list[str]:
        """The label of each row, as text."""
        labels = open_rows(self.path, self.labels)
        if labels.shape != self._rows.shape[:1]:
            raise UsageError(
                f"dataset.labels={self.labels}: {list(labels.shape)} labels for an array of {list(self._rows.shape)}"
            )
        values = labels.read(0, len(labels))
        if values.dtype.kind not in "iubSUOT":
            raise UsageError(f"dataset.labels={self.labels}: holds {values.dtype}, must be whole numbers or text")
        values = values.astype(int) if values.dtype.kind == "b" else values
        return [item.decode("utf-8", "backslashreplace") if isinstance(item, bytes) else str(item) for item in values]

    def _open(self, name: str) -> Split:
        rows, values = self._rows, self._numbers
        good = self._good_rows if self.on_bad == "skip" else np.arange(len(rows))
        chosen = good[split_indices(len(good), self.val_size, self.test_size, self.split_seed)[name]]
        context = None
        if self._has_array:
            context = self.spec.context.read(self._contexts, chosen)
        elif self.spec.context:
            every = number_classes(self._read_labels(), self.spec.context.names, f"dataset.labels={self.labels}")
            context = label_context(every[torch.from_numpy(chosen)], self.spec.context.classes)
        place = printable(str(self.path)) + (f":{self.key}" if self.key else "")
        kind = f"{self.spec.grey_levels:,} grey levels" if self.spec.grey_levels else "real numbers"
        how = f"{self.name} {name}: {len(chosen):,} of {len(rows):,} examples of {place}"
        description = f"{how}, {values.layout} of {kind}, cut with seed {self.split_seed}"
        split = ArrayFileSplit(rows, chosen, values, description, context)
        size = len(chosen) * int(np.prod(split.shape)) * (4 if split.values.grey_levels is None else 1)
        return _hold(split) if size <= HELD_BYTES else split

    @cached_property
    def _good_rows(self) -> np.ndarray:
        """The numbers of the rows that can be used."""
        bad = np.concatenate([self._numbers.convert(block)[1] for _, block in self._rows.blocks()])
        if bad.any():
            first = self._rows.name(int(bad.argmax()))
            log.warning(
                "%s: %s of %s examples are left out; the first, %s, %s",
                self._rows.path,
                f"{bad.sum():,}",
                f"{len(bad):,}",
                first,
                self._numbers.fault(),
            )
        return np.flatnonzero(~bad)


def _check_found(found: dict) -> None:
    """Raise UsageError for a record of :meth:`Arrays.find` that is damaged: it comes with a checkpoint."""
    levels, dropped = found.get("grey_levels"), found.get("dropped_bits")
    classes, layout = found.get("classes"), found.get("layout")
    whole = (levels is None or type(levels) is int and 2 <= levels <= MOST_LEVELS) and type(dropped) is int
    if not (
        (isinstance(found.get("shape"), list) and layout in LAYOUTS[:4] and whole and 0 <= dropped < 64)
        and (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
    ):
        raise UsageError("dataset.found: the record of the arrays is damaged")


def _hold(split: ArrayFileSplit) -> ArraySplit:
    """The same split in memory. The file is read in its own order."""
    data = None
    places = np.full(len(split.rows), -1)
    places[split.numbers] = np.arange(len(split))
    for start, block in split.rows.blocks():
        numbers = np.arange(start, start + len(block))
        inside = places[numbers] >= 0
        x, bad = split.values.convert(block[inside])
        refuse_bad(split.rows, numbers[inside], bad, split.values)
        data = torch.empty((len(split), *split.shape), dtype=x.dtype) if data is None else data
        data[torch.from_numpy(places[numbers[inside]])] = x
    return ArraySplit(data, split.description, split.context)


def refuse_bad(rows: Rows, numbers: Sequence[int], bad: np.ndarray, values: Numbers) -> None:
    """Raise FlowtrainError for the first row that is ``bad``."""
    if bad.any():
        first = int(np.min(np.asarray(numbers)[bad]))
        raise FlowtrainError(
            f"{printable(str(rows.path))}: {rows.name(first)} {values.fault()}; on_bad=skip leaves it out"
        )


def fit_numbers(
    rows: Rows, spec: DataSpec, layout: str | None = None, dropped_bits: int = 0, whole_reals: bool = False
) -> Numbers:
    """How the numbers of an array become those of a flow for the data of ``spec``.

    Args:
        layout, dropped_bits: see :class:`Numbers`; None: found.
        whole_reals: whole numbers may be stored as real ones.

    Raises:
        UsageError: their shape is another, or they are real numbers instead of integers, or the reverse.
    """
    kind, wants_reals = rows.dtype.kind, spec.grey_levels is None
    if kind not in "fiub" or wants_reals != (kind == "f") and not (whole_reals and kind == "f"):
        wanted = "real numbers" if wants_reals else f"integers 0 … {spec.grey_levels - 1}"
        holds = f"{printable(str(rows.path))} holds {rows.dtype} {list(rows.shape)}"
        raise UsageError(f"{holds}: this model takes {wanted} of shape {list(('N', *spec.shape))}".replace("'", ""))
    layout = find_layout(rows.shape, rows.path, layout, spec.shape)
    return Numbers(layout, spec.grey_levels, dropped_bits)


@lru_cache(maxsize=16)
def _extremes(path, key, layout, *_version: int) -> tuple[int, int]:
    """The smallest and the largest integer of an array, for which all of it is read, once for each version of it."""
    least, greatest = 0, 0
    for _, block in open_rows(path, key, layout).blocks():
        if block.size:
            least, greatest = min(least, int(block.min())), max(greatest, int(block.max()))
    return least, greatest
