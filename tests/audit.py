"""Exactness checks for every bijection: round trips, and log-determinants against autograd's Jacobian in float64."""

from __future__ import annotations

import torch
from torch.autograd.functional import jacobian

from flowtrain.runtime import global_batch


def randomize(module, scale=0.1, seed=0):
    """Put a module into float64 and evaluation mode, and move its parameters and moments off their neutral start."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for layer in module.modules():
            if isinstance(layer, global_batch.RunningMoments):
                layer.mean.normal_(generator=generator)
                layer.var.uniform_(0.5, 2, generator=generator)
    return module


def event(layer, batch=3, seed=1, dtype=torch.float64):
    """A batch of random events for ``layer``: (batch, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *layer.shape, generator=generator, dtype=dtype)


def context_for(layer, batch=3, seed=2, dtype=torch.float64):
    """A batch of random contexts for ``layer``, or None if it takes none."""
    if layer.context_shape is None:
        return None
    return torch.randn(batch, *layer.context_shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobian_log_det(function, x, context):
    """log|det ∂f/∂x| of each example by autograd: (B,)."""
    contexts = [None] * len(x) if context is None else context.split(1)
    # not torch.func, which does not support the autograd.Function of an ODE's solver
    jacobians = [
        jacobian(lambda one, context=context: function(one, context)[0].flatten(), one, vectorize=True).flatten(1)
        for one, context in zip(x.split(1), contexts)
    ]
    return torch.linalg.slogdet(torch.stack(jacobians))[1]


def assert_exact(layer, x=None, tolerance=1e-8):
    """Check the round trip and both log-determinants against the Jacobian, for a ``layer`` in float64."""
    x = event(layer) if x is None else x
    context = context_for(layer, len(x))
    z, log_det = layer(x, context)
    back, inverse_log_det = layer.inverse(z, context)
    assert z.shape == (len(x), *layer.out_shape)
    assert log_det.shape == inverse_log_det.shape == (len(x),)
    torch.testing.assert_close(back, x, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(log_det, jacobian_log_det(layer, x, context), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        inverse_log_det, jacobian_log_det(layer.inverse, z.detach(), context), atol=tolerance, rtol=tolerance
    )
