"""The batch size and the learning rate of a run: those given, or where they are "auto" those that suit the data."""

from __future__ import annotations

import logging

from flowtrain.data.spec import DataSpec
from flowtrain.errors import UsageError

log = logging.getLogger("flowtrain")


SMALL = 2000  # a table of fewer rows is small


def is_small_table(rows: int, spec: DataSpec) -> bool:
    return rows < SMALL and not spec.is_image


def usual_batch_size(rows: int, spec: DataSpec) -> int:
    """The batch size that suits a train split of ``rows`` examples that ``spec`` describes, by docs/data.md."""
    if spec.target is not None:
        return 512  # samples of the flow, whose gradient is noisier than that of data
    return 64 if spec.is_image or is_small_table(rows, spec) else 256


def choose_learning_rate(given: float | str, rows: int, spec: DataSpec) -> float:
    """``given``, or where that is "auto" the rate that suits ``rows`` examples, by docs/data.md.

    Raises:
        UsageError: it is no number.
    """
    if isinstance(given, str) and given != "auto":
        raise UsageError(f"optimizer.lr={given}: must be a number or auto")
    if given != "auto":
        return given
    return 1e-3 if is_small_table(rows, spec) else 3e-3


def choose_batch_size(given: int | str, rows: int, spec: DataSpec, processes: int, accumulate: int) -> int:
    """``given``, or where that is "auto" the usual batch size, shrunk to the train split's ``rows`` examples and to a
    multiple of ``processes`` × ``accumulate``.

    Raises:
        UsageError: the split is smaller than the batch given, or than one example for each process and part.
    """
    share = processes * accumulate
    most = rows // share * share
    if not most:
        raise UsageError(
            f"the train split has {rows} examples: too few for processes × trainer.accumulate = "
            f"{processes} × {accumulate}"
        )
    if given != "auto":
        if given > rows:
            raise UsageError(
                f"batch_size={given} is larger than the train split ({rows}); "
                f"the largest that fits is batch_size={most}"
            )
        return given
    usual = usual_batch_size(rows, spec)
    size = min(max(usual // share, 1) * share, most)
    if size != usual:
        why = f"the train split has {rows} examples" if usual > most else f"a multiple of {processes} × {accumulate}"
        log.info("batch_size=auto: %d instead of %d: %s", size, usual, why)
    return size
