"""Samples of a flow, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowtrain.engine.evaluate import evaluation_mode
from flowtrain.engine.memory_budget import even_batches, few_rows, rows_within_budget
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import distributed, seeds

NOISE, NUMBERS = 256, 2**18  # most samples, and numbers in them, whose noise has one seed


def draw_samples(flow: Flow, n: int, seed: int, context: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Draw n samples, (n, *shape) on the CPU, one for each row of ``context`` (n, *context_shape) if there is one,
    without the noise of training.

    A seed gives the same noise at every temperature and on every device.
    """
    of = None if context is None else context.__getitem__
    return torch.cat([samples for _, samples in sample_batches(flow, n, seed, of, temperature)])


def sample_batches(
    flow: Flow,
    n: int,
    seed: int,
    context: Callable[[slice], Tensor] | None = None,
    temperature: float = 1.0,
    rank: int = 0,
    world: int = 1,
    denoise: bool | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield process ``rank``'s batches of n samples: (the number of the first, samples (b, *shape) on the CPU).

    The noise of a sample is a function of its number and of ``seed``: the same in any batch, for any ``world``, at
    every temperature and on every device. The processes take turns, so that together they yield the samples in order.

    Args:
        context: returns the contexts of some samples, (b, *context_shape).
        denoise: whether noise that training adds to the data is taken off; None: where it does.

    Raises:
        FlowtrainError: a sample is not finite.
    """
    was_training = flow.training
    denoise = flow.noise is not None if denoise is None else denoise
    flow.eval()
    try:
        with torch.no_grad(), evaluation_mode(next(flow.parameters()).device):
            block = max(1, min(NOISE, NUMBERS // flow.dimensions))

            def draw(start: int, stop: int) -> Tensor:
                part = None if context is None else context(slice(start, stop)).to(next(flow.parameters()).device)
                latents = _latents(flow, start, stop, block, seed, part, temperature)
                return flow.decode(latents, part, denoise=denoise).cpu()

            few = most = few_rows(flow.dimensions)
            if n > few:
                most = rows_within_budget(lambda: draw(0, few), few, next(flow.parameters()).device)
            most = distributed.broadcast_object(even_batches(n, most, world)) if world > 1 else most
            size = -(-most // block) * block
            for start in range(rank * size, n, world * size):
                yield start, draw(start, min(start + size, n))
    except ValueError as error:
        raise FlowtrainError(f"some samples are not finite; a lower temperature may help: {error}") from error
    finally:
        flow.train(was_training)


def _latents(
    flow: Flow, start: int, stop: int, block: int, seed: int, context: Tensor | None, temperature: float
) -> Tensor:
    """Latents of samples ``start`` to ``stop``; a seed of its own gives each ``block`` its noise."""
    parts = []
    for first in range(start, stop, block):
        given = None if context is None else context[first - start : first - start + block]
        noise = seeds.generator(seed, first)
        parts.append(flow.base_samples(min(block, stop - first), temperature, given, noise))
    return torch.cat(parts)
