"""Work on a GPU that is recorded once and launched as a whole from then on: a CUDA graph."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from flowtrain.runtime import modes

log = logging.getLogger("flowtrain")

T = TypeVar("T")

WARM_UP = 3  # as often as torch.cuda.make_graphed_callables does
# torch before 2.13 leaves the generator in the middle of a recording that failed: random numbers are errors afterwards
SURVIVES_FAILURE = torch.__version__ >= (2, 13)
ROUNDING = 1e-5  # relative, of the results without gradients


class Pool:
    """A stream to record on, and memory for graphs of which no two run at a time."""

    def __init__(self, device: torch.device):
        self.stream, self.memory = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


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

    def __init__(self, work: Callable[[], T], device: torch.device, pool: Pool | None = None):
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool or Pool(device)
        own, side, memory = torch.cuda.current_stream(device), self._pool.stream, self._pool.memory
        side.wait_stream(own)
        try:
            with torch.cuda.stream(side):  # it ends here even after a failure, which torch.cuda.graph does not see to
                for _ in range(WARM_UP):
                    work()
                # other threads may go on: one of the loader's pins memory
                with torch.cuda.graph(self._graph, pool=memory, stream=side, capture_error_mode="thread_local"):
                    self.result = work()
        finally:
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


def difference(some: list[Tensor | None], others: list[Tensor | None]) -> float:
    """The norm of the difference of two lists of tensors, relative to that of the first; NaN and infinity are equal to
    themselves."""
    if [one is None for one in some] != [one is None for one in others]:
        return math.inf
    total = apart = torch.zeros((), dtype=torch.float64)
    for one, other in zip(some, others):
        if one is not None and other is not None:
            one, other = one.double(), other.double()
            same = (one == other) | (one.isnan() & other.isnan())
            apart = apart + torch.where(same, 0.0, one - other).square().sum()
            total = total + torch.where(one.isfinite(), one, 0.0).square().sum()
    return math.sqrt(apart / total) if apart != 0 else 0.0


# ---- layers without gradients


def as_graph(layer: nn.Module, work: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """``work(*inputs)``, whose result depends on ``inputs`` and on the layer's weights alone; where gradients are off,
    on a GPU, as one CUDA graph.

    A first call with inputs of a form is computed without a graph. With its inputs in place one is recorded at the
    second, which is computed both ways; where the results agree, the graph computes the calls from then on. The last
    form alone is kept. A graph reads weights where they are: those that have changed in place are the new ones.
    """
    if torch.compiler.is_compiling() or not _may_record(layer, inputs[0]):
        return work(*inputs)
    form, known = _form(layer, inputs), _known.get(layer)
    if known is None or known.form != form:
        _known[layer] = _Calls(form, inputs)
        return work(*inputs)
    return known(work, inputs)


class _Calls:
    """Calls with inputs of one form, after the first."""

    def __init__(self, form: list, inputs: tuple[Tensor | None, ...]):
        self.form, self.failed = form, False
        self.inputs = [one if one is None else one.clone() for one in inputs]  # where the graph reads them
        self.graph: Graph[tuple[Tensor, ...]] | None = None

    def __call__(self, work, inputs) -> tuple[Tensor, ...]:
        if self.graph is not None:
            return self.replay(self.graph, inputs)
        plain = work(*inputs)
        if not self.failed:
            self.record(work, inputs, plain)
        return plain

    def record(self, work, inputs, plain: tuple[Tensor, ...]) -> None:
        device = inputs[0].device
        try:
            with modes.using(kept=None):  # what is kept from before would be read where it was
                graph = Graph(lambda: work(*self.inputs), device, _shared_pool(device))
            limit = 0.0 if torch.are_deterministic_algorithms_enabled() else ROUNDING
            if not (error := difference([*plain], [*self.replay(graph, inputs)])) <= limit:
                raise RuntimeError(f"its result differs by {error:.2g} from that without it, more than rounding")
            self.graph = graph
        except Exception as error:  # of torch and CUDA, of many kinds
            self.failed = True
            log.info("an inverse runs without a CUDA graph: %s", reason(error))

    def replay(self, graph: Graph[tuple[Tensor, ...]], inputs) -> tuple[Tensor, ...]:
        for own, new in zip(self.inputs, inputs):
            if own is not None:
                own.copy_(new)
        return tuple(one.clone() for one in graph.replay())


_known: WeakKeyDictionary[nn.Module, _Calls] = WeakKeyDictionary()
_pools: WeakValueDictionary[tuple, Pool] = WeakValueDictionary()


def _shared_pool(device: torch.device) -> Pool:
    """That of this thread, as long as one of its graphs is left: they run one after another."""
    key = threading.get_ident(), device
    pool = _pools.get(key) or Pool(device)
    _pools[key] = pool
    return pool


def _may_record(layer: nn.Module, x: Tensor) -> bool:
    if not x.is_cuda or not SURVIVES_FAILURE:
        return False
    hindered = (
        torch.is_grad_enabled()
        or layer.training
        or len(x) == 0
        or modes.current().tracing
        or torch.is_autocast_enabled("cuda")  # which keeps casts of weights
        or torch.is_inference_mode_enabled()
        or torch.cuda.is_current_stream_capturing()
    )
    # what looks at each operation, such as a count of bytes, or replaces tensors, sees none within a graph
    watched = type(x) is not Tensor or _get_current_dispatch_mode() or torch._C._functorch.peek_interpreter_stack()
    return not hindered and not watched


def _form(layer: nn.Module, inputs: tuple[Tensor | None, ...]) -> list:
    """What a graph depends on besides numbers: the inputs' shapes, where weights lie, buffers, which may decide what is
    computed, and how products are computed."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return [
        *(one if one is None else (one.shape, one.stride(), one.dtype, one.device) for one in inputs),
        *((one.data_ptr(), one.dtype) for one in layer.parameters()),
        *((one.data_ptr(), one.dtype, one.is_inference() or one._version) for one in layer.buffers()),
        (cuda.allow_tf32, cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()),
        (threading.get_ident(), torch.cuda.current_stream(inputs[0].device)),
    ]
