"""Two processes with gloo, for tests of what they do together."""

import os

import torch

from flowtrain.cli import exit_codes
from flowtrain.runtime import distributed


def _in_process(rank, work, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", FLOWTRAIN_STORE=f"{folder}/store")
    distributed.init()
    torch.save(work(folder), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.close()
    exit_codes.leave(0)


def together(work, folder):
    """What ``work(folder)`` returns in each of two processes."""
    torch.multiprocessing.spawn(_in_process, (work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
