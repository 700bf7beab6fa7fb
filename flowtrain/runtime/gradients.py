"""Where gradients written by hand may be used, and what takes their place elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowtrain.runtime import modes


def only_autograd_watches() -> bool:
    """Whether nothing but autograd follows what runs now: no compiler, no export, no functorch (vmap, jacrev), and no
    forward-mode differentiation."""
    return (
        modes.values_are_known() and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
    )


def by_hand(device: torch.device) -> bool:
    """Whether autograd alone will differentiate what runs now, in the precision of the weights.

    A ``torch.autograd.Function`` then has fewer operations and keeps less for the gradient. Whatever else watches, and
    autocast, see the plain operations instead.
    """
    return torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type) and only_autograd_watches()


def in_place(*given: Tensor | None) -> bool:
    """Whether a backward pass that is ``given`` these gradients may write into tensors that it has allocated: not if it
    is itself differentiated, or runs for several gradients at once."""
    batched = any(one is not None and torch._C._functorch.is_legacy_batchedtensor(one) for one in given)
    return not (batched or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())


def by_autograd(
    function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], needed: Sequence[bool], given: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the ``inputs`` of ``function`` that are ``needed``, None for the others, where its results are
    ``given`` theirs. Autograd can differentiate them again."""
    with torch.enable_grad():
        wanted = [one for one, is_needed in zip(inputs, needed) if is_needed]
        found = iter(torch.autograd.grad(function(), wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]
