"""The command line in this process, for tests of many commands."""

from __future__ import annotations

import os
import sys

from hydra.core.config_store import ConfigStore

from flowtrain import cli, jobs


def flowtrain(cwd, *words) -> int:
    """``flowtrain words`` in the folder ``cwd``: the exit code, or what it raises."""
    before, sys.argv = os.getcwd(), ["flowtrain"]
    os.chdir(cwd)
    jobs.failures.clear()
    ConfigStore.instance().repo.pop("ckpt", None)  # of the commands before: Hydra copies them many times
    try:
        return cli.run(list(words))
    finally:
        os.chdir(before)
