"""Where gradients written by hand may be used."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from flowtrain.runtime import modes


def by_hand(device: torch.device) -> bool:
    """Whether autograd alone will differentiate what runs now.

    A ``torch.autograd.Function`` then has fewer operations and keeps less for the gradient. A compiler, an export,
    functorch (vmap, jacrev), forward-mode differentiation and autocast see the plain operations instead.
    """
    return (
        torch.is_grad_enabled()
        and modes.values_are_known()
        and not torch.is_autocast_enabled(device.type)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def in_place(*given: torch.Tensor | None) -> bool:
    """Whether a backward pass that is ``given`` these gradients may write into tensors that it has allocated: not if it
    is itself differentiated, or runs for several gradients at once."""
    batched = any(one is not None and torch._C._functorch.is_legacy_batchedtensor(one) for one in given)
    return not (batched or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
