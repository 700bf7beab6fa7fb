"""Runs commands in this process, for tests of many commands."""

from __future__ import annotations

import os
import sys

from hydra.core.config_store import ConfigStore

from flowtrain.cli import jobs, main
from flowtrain.commands import CHECKPOINT_KEYS
from flowtrain.config import compose


def flowtrain(cwd, *words) -> int:
    """Run ``flowtrain words`` in the folder ``cwd`` and return its exit code, or raise its exception."""
    before, sys.argv = os.getcwd(), ["flowtrain"]
    os.chdir(cwd)
    jobs.failures.clear()
    for group in CHECKPOINT_KEYS:
        ConfigStore.instance().repo.pop(group, None)  # left by earlier commands; Hydra would copy them many times
    compose._run_dirs.clear()
    try:
        return main.run(list(words))
    finally:
        os.chdir(before)
