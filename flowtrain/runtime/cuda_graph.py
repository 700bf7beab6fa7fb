"""Work on a GPU that is recorded once and launched as a whole from then on: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

WARM_UP = 3  # as often as torch.cuda.make_graphed_callables does


class Graph(Generic[T]):
    """``work()``, which :meth:`replay` does by one launch in place of one for each kernel.

    ``work`` is called a few times as it is, so that libraries set themselves up and choose their algorithms, and once
    more to be recorded. It must read its inputs from the same tensors every time, and no value of them on the host.
    Random numbers are those that it would draw itself: a replay begins at the seed and the offset that the device's
    generator has then, and moves it on (Note [CUDA Graph-safe RNG states] in torch's ATen/cuda/CUDAGeneratorImpl.h; in
    CUDAGeneratorImpl.cpp, ``replay_prologue`` copies both to the device, and ``manual_seed`` sets them to the seed and
    0). ``work`` itself must not seed it.

    Attributes:
        result: what ``work`` returned; its tensors, and all others that ``work`` left, are written by each replay.

    Raises:
        Exception: what ``work`` raised, or torch where it cannot be recorded.
    """

    def __init__(self, work: Callable[[], T], device: torch.device):
        self._graph = torch.cuda.CUDAGraph()
        own, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(own)
        with torch.cuda.stream(side):  # it ends here even after a failure, which torch.cuda.graph does not see to
            for _ in range(WARM_UP):
                work()
            # other threads may go on: one of the loader's pins memory
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self.result = work()
        own.wait_stream(side)

    def replay(self) -> T:
        """Do the work on the present stream; returns ``result``."""
        self._graph.replay()
        return self.result


def reason(error: BaseException) -> str:
    """Why there is no graph, in one line: of a chain of errors the first, since a failed recording fails once more at
    its end."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
