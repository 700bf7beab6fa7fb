"""Arrays as contexts: an image, or another array of numbers, with each example."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.array_files import Rows
from flowtrain.errors import FlowtrainError, UsageError


@dataclass(frozen=True)
class ArrayContext:
    """Each example comes with an array of numbers, standardized in each channel, its first axis.

    Attributes:
        name: of the array of all of them in their file.
        shape: of one, (C, H, W) or another.
        mean, std: C numbers each, of the file's.
    """

    name: str
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, name: str, rows: Rows) -> ArrayContext:
        """The context that ``rows`` (N, C, …) are. All of them are read.

        Raises:
            UsageError: they are not arrays of numbers.
            FlowtrainError: a number is not finite.
        """
        if rows.dtype.kind not in "fiub" or len(rows.shape) < 2 or 0 in rows.shape:
            raise UsageError(
                f"dataset.context={name}: is {rows.dtype} {list(rows.shape)}; it must be an array of numbers for each"
                " example, such as (N, channels, height, width)"
            )
        axes = (0, *range(2, len(rows.shape)))
        count, total, squares = len(rows) * int(np.prod(rows.shape[2:])), 0.0, 0.0
        for _, block in rows.blocks():
            total = total + block.sum(axes, dtype=np.float64)
        mean = total / count
        for _, block in rows.blocks():
            squares = squares + np.square(block - mean.reshape(-1, *[1] * len(axes[1:]))).sum(axes)
        std = np.sqrt(squares / count)
        if not np.isfinite(std).all():
            raise FlowtrainError(f"dataset.context={name}: {rows.path} holds a number there that is not finite")
        return cls(name, rows.shape[1:], tuple(mean.tolist()), tuple((std + (std == 0)).tolist()))

    @classmethod
    def from_record(cls, record: dict) -> ArrayContext:
        """The inverse of :meth:`to_record`. Raises UsageError for a damaged one."""
        try:
            context = cls(record["name"], *(tuple(record[key]) for key in ("shape", "mean", "std")))
            whole = all(type(n) is int and n > 0 for n in context.shape) and isinstance(context.name, str)
            channels = {len(context.mean), len(context.std)} == {context.shape[0]}
            if whole and channels and min(context.std) > 0 and all(map(isfinite, (*context.mean, *context.std))):
                return context
        except (KeyError, TypeError, IndexError):
            pass
        raise UsageError("dataset.found: the record of the context is damaged")

    def to_record(self) -> dict:
        """As plain data, for a checkpoint."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def read(self, rows: Rows, numbers: np.ndarray | None = None) -> Tensor:
        """Rows of a file as a flow takes them, float32 (n, *shape).

        Args:
            numbers: of the rows; None: all.

        Raises:
            UsageError: they have another shape.
            FlowtrainError: a number is not finite.
        """
        if rows.dtype.kind not in "fiub" or tuple(rows.shape[1:]) != self.shape:
            wanted = f"{['N', *self.shape]}".replace("'", "")
            raise UsageError(f"{rows.path} holds {rows.dtype} {list(rows.shape)}: '{self.name}' is numbers {wanted}")
        numbers = np.arange(len(rows)) if numbers is None else numbers
        mean, std = (np.reshape(each, (-1, *[1] * (len(self.shape) - 1))) for each in (self.mean, self.std))
        values = torch.from_numpy(((rows.take(numbers) - mean) / std).astype(np.float32))
        bad = ~values.flatten(1).isfinite().all(1)
        if bad.any():
            where = rows.name(int(numbers[int(bad.nonzero()[0])]))
            raise FlowtrainError(f"{rows.path}: {where} of the context '{self.name}' holds a number that is not finite")
        return values
