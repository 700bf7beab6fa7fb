"""Runs a job, on each process of a group that :mod:`flowtrain.cli.launcher` starts or on this one."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import signal
import sys
import threading
from pathlib import Path

from omegaconf import OmegaConf

from flowtrain.cli import exit_codes
from flowtrain.commands import COMMANDS
from flowtrain.config.schema import JobConfig
from flowtrain.errors import FlowtrainError, Interrupted
from flowtrain.runtime import allocator, distributed
from flowtrain.runtime.distributed import PeerFailure
from flowtrain.runtime.signals import end_if_signalled, end_in_kernel


def execute(command: str, config: JobConfig, run_dir: str, logging_config: dict | None = None) -> dict:
    """On every rank: join the others and call the command's ``main(config, run_dir)``."""
    if not distributed.is_main():
        logging.basicConfig(level=logging.WARNING, format=f"[rank {distributed.rank()}] %(message)s", force=True)
    elif logging_config:
        from hydra.core.utils import configure_log

        configure_log(OmegaConf.create(logging_config))
    allocator.keep_freed_memory()
    with distributed.catch_peer_failures():
        distributed.init()
        distributed.limit_waits(config.dist.timeout_s)
        module = importlib.import_module(COMMANDS[command].module)
        if config.threads != "auto":
            import torch

            torch.set_num_threads(config.threads)
        end_if_signalled()
        return module.main(config, run_dir)


def main() -> None:
    """Read a job from stdin, run it, and write its summary or its error into the group's folder."""
    end_in_kernel()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are not UTF-8
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_follow_parent, daemon=True).start()
    file = Path(job.pop("folder")) / f"{distributed.rank()}.json"
    result, code = {}, 0
    try:
        result = execute(**job) or {}
        distributed.close()
    except Exception as error:
        text, code = exit_codes.describe_error(
            error, None if getattr(job["config"], "dry_run", False) else job["run_dir"]
        )
        kind = "peer" if isinstance(error, PeerFailure) else "own" if isinstance(error, FlowtrainError) else "other"
        signum = error.signum if isinstance(error, Interrupted) else None
        result = {"error": text, "exit_code": code, "kind": kind, "signum": signum}
    file.with_suffix(".tmp").write_text(json.dumps(result))
    file.with_suffix(".tmp").replace(file)
    exit_codes.leave(code)


def _follow_parent() -> None:
    """End as if by SIGTERM when the parent has ended, which closes stdin."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
