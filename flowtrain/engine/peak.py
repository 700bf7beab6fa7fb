"""Peak memory of a function, and of this process."""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The greatest number of bytes of tensors alive at once during ``work()``, beyond those alive before.

    On a GPU the allocator counts. On the CPU every tensor that an operation returns counts, each storage once, so that
    the result is the same on every machine. Memory that a kernel allocates internally does not count there.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages() as storages:
        work()
    return storages.peak


def peak_memory(device: torch.device) -> int:
    """The greatest number of bytes that this process has used so far: of a GPU's tensors, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tensors_in(value) -> Iterator[torch.Tensor]:
    """The tensors that ``value`` is, or has in its dicts, lists and tuples.

    >>> [len(one) for one in tensors_in({"a": [torch.zeros(2), 3], "b": torch.zeros(4)})]
    [2, 4]
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


class _Storages(TorchDispatchMode):
    """Counts the bytes of tensors that were allocated within it and are alive."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}  # storage -> bytes
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else torch imports its compiler, which takes seconds, at the first operation."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = set(map(_key, tensors_in((args, kwargs))))
        for tensor in tensors_in(out):
            if _key(tensor) not in inputs:  # neither a view nor in place
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
