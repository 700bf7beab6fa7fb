"""CUDA graphs for tests without a GPU: the operations of a recording, computed again in the same tensors."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowtrain.runtime import native

READS = ("aten::_local_scalar_dense", "aten::nonzero")


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    made: list[Graph] = []
    adds = 0.0  # to every result of a replay, for a graph that is wrong

    def __init__(self):
        self.recorded, self.replays = [], 0
        self.made.append(self)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.recorded:
            results = _tensors(function(*args, **kwargs))
            for old, new in [] if function._schema.is_mutable else zip(outputs, results, strict=True):
                old.copy_(new + self.adds if new.is_floating_point() else new)


class _Recorder(TorchDispatchMode):
    """As on a GPU, a recording changes nothing that was there before, and its results have no values."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph, self.before, self.new = graph, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
        if func._schema.is_mutable:
            for one in _tensors((args, kwargs)):
                if _key(one) not in {*self.new, *self.before}:
                    self.before[_key(one)] = one, one.clone()
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.graph.recorded.append((func, args, kwargs or {}, _tensors(out)))
            if not func._schema.is_mutable:
                self.new |= {_key(one): one for one in _tensors(out)}
        return out

    def forget_values(self):
        with torch.no_grad():
            for one, value in self.before.values():
                one.detach().copy_(value)
            for one in self.new.values():
                if one.is_floating_point():
                    one.detach().fill_(torch.nan)


def _tensors(values) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _record(graph: Graph, pool, stream, capture_error_mode):
    seed, torch.manual_seed = torch.manual_seed, _refuse
    recorder = _Recorder(graph)
    try:
        with recorder:
            yield
    finally:
        torch.manual_seed = seed
        recorder.forget_values()


def _refuse(seed):
    raise RuntimeError("a generator is seeded while a stream is capturing")


def install(monkeypatch, free: int = 2**40) -> list[Graph]:
    """Replace what flowtrain uses of torch.cuda, and let no C++ function compute, as on a GPU; returns the list of the
    graphs to come."""
    monkeypatch.setattr(native, "in_memory", lambda *tensors: False)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(Graph, "adds", 0.0)
    for name, value in {
        "CUDAGraph": Graph,
        "graph_pool_handle": object,
        "graph": _record,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "mem_get_info": lambda device: (free, free),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Graph.made
