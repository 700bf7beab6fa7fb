"""The data of a run or of a checkpoint."""

from __future__ import annotations

from flowtrain.config.build import build
from flowtrain.data import Columns


def columns_of(state: dict) -> Columns | None:
    """What a checkpoint knows of a table's columns; None of other data, and in checkpoints older than tables."""
    record = state.get("columns")
    return Columns.from_record(record) if record else None


def open_as(columns: Columns | None, cfg):
    """The data set of ``cfg``, a table's columns read as a checkpoint knows them: in its categories and units."""
    data = build(cfg.dataset, allow=cfg.allow, on_bad=cfg.on_bad)
    if columns:
        data.use_columns(columns)
    return data


def has_bits(cfg, columns: Columns | None) -> bool:
    """Whether the data are integers, of which bits per dimension mean something."""
    return cfg.dataset.levels is not None or columns is not None and columns.all_integer


def is_image(cfg) -> bool:
    return len(cfg.dataset.shape) == 3
