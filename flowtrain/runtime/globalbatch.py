"""What a layer may know of the batch that all processes share: its random numbers and its moments.

A training step sees one *global* batch, cut into slices for processes and for accumulation. Random numbers are
drawn for the whole of it and sliced, and moments are taken over the whole of it, so that a run does not depend on
how many processes shared the work.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

_offset, _total = 0, None  # which rows of the global batch this process is working on
_centred = False
_repeating = False


@contextmanager
def rows(offset: int, total: int):
    """Within it, a batch is rows ``offset, offset + 1, …`` of a global batch of ``total``."""
    global _offset, _total
    previous = _offset, _total
    _offset, _total = offset, total
    try:
        yield
    finally:
        _offset, _total = previous


def first_row() -> int:
    """The row of the global batch that a batch begins with."""
    return _offset


@contextmanager
def centred():
    """Within it, :func:`uniform` returns ½ everywhere: dequantization to the centre of each bin."""
    global _centred
    previous, _centred = _centred, True
    try:
        yield
    finally:
        _centred = previous


def repeater():
    """A context for doing the work of this moment once more later: on the same rows, and nothing remembered twice."""
    kept = _offset, _total

    @contextmanager
    def again():
        global _repeating
        previous, _repeating = _repeating, True
        try:
            with rows(*kept):
                yield
        finally:
            _repeating = previous

    return again


def uniform(shape, device=None, dtype=torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) of ``shape`` (batch first), the same for any number of processes, compiled or not."""
    if torch.compiler.is_compiling():
        return torch.ops.flowtrain.uniform(shape, torch.device(device or "cpu"), dtype)
    return _uniform(shape, device, dtype)


def _uniform(shape, device, dtype) -> Tensor:
    if _centred:
        return torch.full(shape, 0.5, device=device, dtype=dtype)
    if _total is None:
        return torch.rand(shape, device=device, dtype=dtype)
    return torch.rand((_total, *shape[1:]), device=device, dtype=dtype)[_offset : _offset + shape[0]]


@torch.library.custom_op("flowtrain::uniform", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _opaque(shape: list[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a compiler must not look into: it would compile for the rows of one slice alone, with numbers of its own."""
    return _uniform(shape, device, dtype).clone()


@_opaque.register_fake
def _(shape, device, dtype):
    return torch.empty(shape, device=device, dtype=dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of every channel, axis 1, over the global batch; differentiable."""
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, axes, correction=0)
    if dist.is_initialized() and dist.get_world_size() > 1:
        world = dist.get_world_size()
        local = mean
        mean = _summed(local) / world  # every process holds the same number of rows
        var = _summed(var + (local - mean).square()) / world
    return mean, var


@torch.library.custom_op("flowtrain::summed", mutates_args=())
def _summed(x: Tensor) -> Tensor:
    """x summed over the processes, differentiable, and opaque to a compiler."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


_summed.register_fake(torch.empty_like)
_summed.register_autograd(lambda ctx, gradient: _summed(gradient))


class RunningMoments(nn.Module):
    """The moments that batch normalization divides by: of the batch in training, remembered ones in evaluation."""

    def __init__(self, channels: int, momentum: float = 0.1):
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum} must be above 0 and at most 1")
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.seen = None  # batches averaged so far while re-estimating, else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.mean, self.var
        mean, var = moments(x)
        if _repeating:
            return mean, var
        with torch.no_grad():
            weight = self.momentum
            if self.seen is not None:
                self.seen += 1
                weight = 1 / self.seen
            for kept, new in ((self.mean, mean), (self.var, var)):
                # a batch that went wrong is skipped by the trainer and must not stay here either
                kept.lerp_(torch.where(new.isfinite(), new.to(kept.dtype), kept), weight)
        return mean, var


def has_moments(model: nn.Module) -> bool:
    return any(isinstance(module, RunningMoments) for module in model.modules())


@contextmanager
def reestimating(model: nn.Module):
    """Within it, the batches that pass through ``model`` replace its remembered moments by their plain average.

    Only the moments are in training mode: everything else, dropout among it, evaluates.
    """
    was_training = model.training
    model.eval()
    found = [module for module in model.modules() if isinstance(module, RunningMoments)]
    for module in found:
        module.training, module.seen = True, 0
    try:
        yield
    finally:
        for module in found:
            module.seen = None
        model.train(was_training)
