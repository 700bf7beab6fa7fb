"""Runs a function in two processes with gloo."""

import os

import torch

from flowtrain.cli import exit_codes
from flowtrain.runtime import distributed


def _run_rank(rank, work, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", FLOWTRAIN_STORE=f"{folder}/store")
    distributed.init()
    torch.save(work(folder), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.close()
    exit_codes.leave(0)


def run_on_two_ranks(work, folder):
    """Run ``work(folder)`` in two processes and return the result of each."""
    torch.multiprocessing.spawn(_run_rank, (work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
