"""The commands, in one table. Each module's ``main(config, run_dir)`` runs one; it is imported when a job starts."""

from typing import NamedTuple


class Command(NamedTuple):
    """Attributes:
    module: where its ``main`` is.
    summary: one line for ``flowtrain --help``.
    """

    module: str
    summary: str


COMMANDS = {
    "train": Command("flowtrain.train", "fit a flow to data"),
    "eval": Command("flowtrain.commands.eval", "bits per dimension of a run"),
    "sample": Command("flowtrain.commands.sample", "draws from a run"),
    "check": Command("flowtrain.commands.check", "audit of a run's flow, or of a new one"),
    "score": Command("flowtrain.commands.score", "a likelihood for each row or image"),
    "bench": Command("flowtrain.commands.bench", "time and memory beside other libraries"),
}
