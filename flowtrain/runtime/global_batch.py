"""The random numbers and the moments of the global batch, which all processes share.

A training step works on one *global* batch, cut into slices for processes and for accumulation. Random numbers are
drawn for all of its rows and then sliced, and moments are taken over all of its rows. So a run does not depend on how
many processes share the work. Evaluation has no global batch: the random numbers of an example are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowtrain.runtime import modes
from flowtrain.runtime.noise import ExampleNoise


def rows(first: int, total: int) -> AbstractContextManager[None]:
    """Within it, a batch is rows ``first, first + 1, …`` of a global batch of ``total`` rows."""
    return modes.using(first_row=first, global_rows=total)


def examples(index: Tensor, *seed: int) -> AbstractContextManager[None]:
    """Within it, a batch is the examples with numbers ``index`` (B,), and the random numbers of each are a function of
    ``seed`` and its own number: the same on every device, in whatever batch it is."""
    return modes.using(noise=ExampleNoise(index, *seed))


def is_numbered() -> bool:
    """Whether the rows of a batch have numbers, which their random numbers depend on."""
    mode = modes.current()
    return mode.noise is not None or mode.global_rows is not None


def example_numbers() -> Tensor:
    """The numbers of the examples of a batch, (B,), within :func:`examples`."""
    return modes.current().noise.index


def first_row() -> int:
    """The row of the global batch at which this batch begins."""
    return modes.current().first_row


def bin_centres() -> AbstractContextManager[None]:
    """Within it, :func:`uniform` returns ½ everywhere: dequantization maps each integer to the centre of its bin."""
    return modes.using(bin_centres=True)


def uniform(shape, device=None, dtype=torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) of ``shape`` (batch first), the same for any number of processes, compiled or not."""
    if torch.compiler.is_compiling():
        return torch.ops.flowtrain.uniform(shape, torch.device(device or "cpu"), dtype)
    return _uniform(shape, device, dtype)


def _uniform(shape, device, dtype) -> Tensor:
    mode = modes.current()
    if mode.bin_centres:
        return torch.full(shape, 0.5, device=device, dtype=dtype)
    if mode.noise is not None:
        return mode.noise.uniform(shape, device, dtype)
    if mode.global_rows is None:
        return torch.rand(shape, device=device, dtype=dtype)
    numbers = torch.rand((mode.global_rows, *shape[1:]), device=device, dtype=dtype)
    return numbers[mode.first_row : mode.first_row + shape[0]]


def stratified(size: int, device=None, dtype=torch.float32) -> Tensor:
    """Numbers in [0, 1), (size,): in a global batch of n rows one in each of n equal parts, in the order of the rows;
    of examples, uniform ones."""
    u, mode = uniform((size,), device, dtype), modes.current()
    if mode.noise is not None:
        return u
    rows = torch.arange(mode.first_row, mode.first_row + size, device=u.device, dtype=u.dtype)
    return (rows + u) / (mode.global_rows or size)


@torch.library.custom_op("flowtrain::uniform", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _opaque(shape: list[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Opaque to a compiler, which would compile it for the rows of one slice alone, with numbers of its own."""
    return _uniform(shape, device, dtype).clone()


@_opaque.register_fake
def _(shape, device, dtype):
    return torch.empty(shape, device=device, dtype=dtype)


def stored_moments() -> AbstractContextManager[None]:
    """Within it, batch normalization is one function in training mode too: that of its running moments."""
    return modes.using(stored_moments=True)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """Numbers for the elements of x, in its order in memory: 0 with probability ``p``, else 1/(1 − p)."""
    x = x.detach()
    return torch.ops.flowtrain.dropout_mask(x, p) if torch.compiler.is_compiling() else _dropout_mask(x, p)


def _dropout_mask(x: Tensor, p: float) -> Tensor:
    mask = (_uniform(x.shape, x.device, torch.float32) >= p).to(x.dtype).div_(1 - p)
    return mask if mask.stride() == x.stride() else torch.empty_like(x).copy_(mask)


@torch.library.custom_op("flowtrain::dropout_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _opaque_mask(x: Tensor, p: float) -> Tensor:
    """Opaque to a compiler as uniform numbers are. It would keep the mask as booleans, which it writes slowly."""
    return _dropout_mask(x, p)


@_opaque_mask.register_fake
def _(x, p):
    return torch.empty_like(x)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of every channel, axis 1, over the global batch; differentiable."""
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, axes, correction=0)
    if dist.is_initialized() and dist.get_world_size() > 1:
        world = dist.get_world_size()
        local = mean
        mean = _all_reduce(local) / world  # every process holds the same number of rows
        var = _all_reduce(var + (local - mean).square()) / world
    return mean, var


@torch.library.custom_op("flowtrain::all_reduce", mutates_args=())
def _all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all processes, differentiable, and opaque to a compiler."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


_all_reduce.register_fake(torch.empty_like)
_all_reduce.register_autograd(lambda ctx, gradient: _all_reduce(gradient))


class RunningMoments(nn.Module):
    """Mean and variance of each channel for batch normalization: the batch's in training, running ones in evaluation.

    Args:
        channels: C.
        momentum: weight of a new batch in the running moments, in (0, 1].

    Raises:
        ValueError: ``momentum`` outside (0, 1].
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1):
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum} must be above 0 and at most 1")
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.batches: int | None = None  # averaged so far within :func:`reestimate`, else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, both (C,), for x (B, C, …)."""
        mode = modes.current()
        if mode.stored_moments or not self.training:
            return self.mean, self.var
        mean, var = moments(x)
        if mode.repeating:
            return mean, var
        with torch.no_grad():
            weight = self.momentum
            if self.batches is not None:
                self.batches += 1
                weight = 1 / self.batches
            for running, new in ((self.mean, mean), (self.var, var)):
                # the trainer skips a batch that is not finite, and the running moments must skip it too
                running.lerp_(torch.where(new.isfinite(), new.to(running.dtype), running), weight)
        return mean, var


def has_moments(model: nn.Module) -> bool:
    """Whether ``model`` holds batch normalization."""
    return any(isinstance(module, RunningMoments) for module in model.modules())


@contextmanager
def reestimate(model: nn.Module) -> Iterator[None]:
    """Within it, the batches that pass through ``model`` replace its running moments by their plain average.

    Only the moments are in training mode. All other modules, such as dropout, are in evaluation mode.
    """
    was_training = model.training
    model.eval()
    found = [module for module in model.modules() if isinstance(module, RunningMoments)]
    for module in found:
        module.training, module.batches = True, 0
    try:
        yield
    finally:
        for module in found:
            module.batches = None
        model.train(was_training)
