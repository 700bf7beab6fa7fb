"""The one line that is said where a device's memory does not suffice."""

from __future__ import annotations

import re
from contextlib import contextmanager

import torch

from flowtrain.engine.peak import peak_memory
from flowtrain.errors import OutOfMemory
from flowtrain.runtime.environment import device_name

_SAID = r"out of memory|can't allocate memory|STATUS_ALLOC_FAILED"  # by CUDA, torch on a CPU, and cuBLAS or cuDNN


@contextmanager
def out_of_memory(device: torch.device, what: str, less: str = ""):
    """Raise OutOfMemory, in one line, where ``device`` has too little memory for the work within it.

    Args:
        what: was computed.
        less: the keys that make it need less; by default how to get more memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device_name(device)}: {what} (peak {peak_memory(device) / 2**30:.1f} GiB); "
            f"{less or more_memory(device)}"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is what torch, CUDA or one of its libraries raises for lack of memory."""
    return isinstance(error, torch.OutOfMemoryError) or re.search(_SAID, str(error)) is not None


def more_memory(device: torch.device) -> str:
    """How to get more memory than there is on ``device``."""
    if device.type == "cuda":
        return "nvidia-smi shows what else is there; CUDA_VISIBLE_DEVICES= in front of the command computes on the CPU"
    return "something else on this machine may be using it"
