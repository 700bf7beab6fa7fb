"""The batch size of a run: the one given, or the one that suits the data."""

from __future__ import annotations

import logging

from flowtrain.data.spec import DataSpec
from flowtrain.errors import UsageError

log = logging.getLogger("flowtrain")


def usual_batch_size(rows: int, spec: DataSpec) -> int:
    """The batch size that suits a train split of ``rows`` examples that ``spec`` describes."""
    return 64


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
