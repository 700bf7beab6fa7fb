"""Samples of a flow, a batch at a time."""

from __future__ import annotations

import torch

from flowtrain.engine.evaluate import exact_arithmetic
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow


def draw_samples(
    flow: Flow, n: int, seed: int, context: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Draw n examples, (n, *shape) on the CPU. A seed gives the same noise at every temperature and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return decode(flow, flow.latents(n, temperature=temperature, context=context, generator=generator), context)


def decode(flow: Flow, latents: torch.Tensor, context: torch.Tensor | None = None, batch: int = 64) -> torch.Tensor:
    """Decode latents a batch at a time, to the CPU. Raises FlowtrainError where samples are not finite."""
    contexts = [None] * len(latents) if context is None else context.split(batch)
    was_training = flow.training
    flow.eval()
    try:
        with exact_arithmetic():
            parts = [flow.decode(*pair).cpu() for pair in zip(latents.split(batch), contexts)]
    except ValueError as error:
        raise FlowtrainError(f"some samples are not finite; a lower temperature may help: {error}") from error
    finally:
        flow.train(was_training)
    return torch.cat(parts)
