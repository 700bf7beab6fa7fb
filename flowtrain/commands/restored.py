"""What the commands that open a checkpoint begin with."""

from __future__ import annotations

from dataclasses import dataclass

from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Columns
from flowtrain.data.dataset import Dataset
from flowtrain.data.spec import has_bits
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed


@dataclass(frozen=True)
class Restored:
    """Attributes:
    flow: with the checkpoint's weights, on this process's device.
    weights: which they are: "ema" or "raw".
    dataset: of the checkpoint's configuration; none of its files is open.
    columns: of a table, as the checkpoint records them; else None.
    """

    flow: Flow
    weights: str
    dataset: Dataset
    columns: Columns | None

    @property
    def has_bits(self) -> bool:
        """Whether the data are integers, so that bits per dimension mean something."""
        return has_bits(self.dataset.spec, self.columns)


def restore(config: TrainConfig, path: str, weights: str) -> Restored:
    """The flow and the dataset of the checkpoint at ``path``, whose configuration ``config`` contains."""
    state = checkpoint.read(path)
    dataset = build_dataset(config, state["columns"])
    flow = build_flow(config, dataset.spec, distributed.device())
    weights = checkpoint.load_weights(flow, state, weights)
    return Restored(flow, weights, dataset, Columns.from_record(state["columns"]) if state["columns"] else None)
