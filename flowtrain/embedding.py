"""The network between a context and the flow that is conditional on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import build, check_shape


def build_embedding(
    embedding: Callable[..., nn.Module] | nn.Module | None, context_shape: Sequence[int] | None
) -> tuple[nn.Module | None, tuple[int, ...] | None]:
    """The network and the shape of what it makes of a context; without one, None and ``context_shape``.

    Args:
        embedding: a module, or a factory called with ``context_shape``, of maps (B, *context_shape) -> (B, *out_shape).
            Where the module has no attribute ``out_shape``, it is run on zeros in evaluation mode.
        context_shape: of one context, or None.

    Raises:
        ValueError: there is no context, or the module does not take contexts of this shape or does not return a row for
            each.

    >>> net, shape = build_embedding(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (3, 4))
    >>> shape
    (4,)
    """
    shape = None if context_shape is None else check_shape(context_shape)
    if embedding is None:
        return None, shape
    if shape is None:
        raise ValueError("embedding: there is no context to embed; give context_shape too")
    net = embedding
    if not isinstance(embedding, nn.Module):
        net = build("embedding", embedding, context_shape=shape)
        if not isinstance(net, nn.Module):
            raise ValueError(f"embedding: the factory returned {type(net).__name__}, not a torch module")
    return net, check_shape(net.out_shape) if hasattr(net, "out_shape") else _run_on_zeros(net, shape)


def _run_on_zeros(net: nn.Module, context_shape: tuple[int, ...]) -> tuple[int, ...]:
    like = next((one for one in net.parameters() if not isinstance(one, nn.UninitializedParameter)), torch.empty(0))
    zeros = torch.zeros(1, *context_shape, device=like.device, dtype=like.dtype)
    was_training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        with torch.no_grad():
            result = net(zeros)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        why = f"does not take a context of shape {list(context_shape)}: {str(error).splitlines()[0]}"
        raise ValueError(f"embedding: {type(net).__name__} {why}") from error
    finally:
        for module in was_training:
            module.training = True
    if not isinstance(result, Tensor) or result.dim() < 2 or len(result) != 1:
        found = f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"embedding: {type(net).__name__} returns {found} for one context, not a row (1, n)")
    return tuple(result.shape[1:])
