"""The data of a run or of a checkpoint."""

from __future__ import annotations

from flowtrain.config.build import build
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Columns


def columns_of(state: dict) -> Columns | None:
    """A table's columns as a checkpoint records them; None for other data."""
    record = state.get("columns")
    return Columns.from_record(record) if record else None


def open_dataset(columns: Columns | None, config: TrainConfig):
    """The data set of ``config``, with a table's ``columns`` in the categories and units of a checkpoint."""
    data = build(config.dataset, "dataset", allow=config.allow, on_bad=config.on_bad)
    if columns:
        data.use(columns)
    return data


def has_bits(config: TrainConfig, columns: Columns | None) -> bool:
    """Whether the data are integers, so that bits per dimension mean something."""
    return config.dataset["levels"] is not None or columns is not None and columns.all_integer


def is_image(config: TrainConfig) -> bool:
    return len(config.dataset["shape"]) == 3
