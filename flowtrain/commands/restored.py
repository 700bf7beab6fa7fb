"""What the commands that open a checkpoint begin with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flowtrain.config import places, runs
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Columns, Split
from flowtrain.data.dataset import Dataset
from flowtrain.data.spec import has_bits
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.engine.precision import set_tf32
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed


@dataclass(frozen=True)
class Restored:
    """Attributes:
    flow: with the checkpoint's weights, on this process's device.
    weights: which they are: "ema" or "raw".
    dataset: of the checkpoint's configuration; none of its files is open.
    columns: of a table, as the checkpoint records them; else None.
    run: the checkpoint's run directory; None of a lone file.
    opened: the splits that have been opened.
    """

    flow: Flow
    weights: str
    dataset: Dataset
    columns: Columns | None
    run: Path | None
    opened: set[str] = field(default_factory=set)

    def split(self, name: str) -> Split:
        """Open "train", "val" or "test"; the first time after a line that says where a run remembers its data."""
        if distributed.is_main() and not self.opened:
            places.announce(self.run, self.dataset)
        self.opened.add(name)
        return self.dataset.split(name)

    @property
    def has_bits(self) -> bool:
        """Whether the data are integers, so that bits per dimension mean something."""
        return has_bits(self.dataset.spec, self.columns)


def restore(config: TrainConfig, path: str, weights: str) -> Restored:
    """The flow and the dataset of the checkpoint at ``path``, whose configuration ``config`` contains. From here on
    float32 is exact, in whatever precision it was trained."""
    set_tf32("float32")
    state = checkpoint.read(path)
    dataset = build_dataset(config, state["columns"])
    device = distributed.device()
    with out_of_memory(device, "the flow's weights"):
        flow = build_flow(config, dataset.spec, device)
        weights = checkpoint.load_weights(flow, state, weights)
    columns = Columns.from_record(state["columns"]) if state["columns"] else None
    return Restored(flow, weights, dataset, columns, runs.run_of(Path(path)))
