"""A coupling of vectors, its network and both of its splines, as one function with a gradient written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowtrain.bijections.native import rational_quadratic
from flowtrain.bijections.univariate import per_element
from flowtrain.runtime import dense, gradients, native


class Plan(NamedTuple):
    """What a coupling does besides its tensors.

    Attributes:
        conditioning: a view of the part of x (B, D) that the network sees.
        kinds: of the network's layers.
        places, settings: those of :func:`flowtrain.bijections.native.rational_quadratic.spline_of_parts`.
        by_torch: the splines by torch's operations, as a function of x, of the network's output and of the parameters
            that all rows share: for derivatives of gradients.
    """

    conditioning: Callable[[Tensor], Tensor]
    kinds: Sequence[dense.Kind]
    places: Tensor
    settings: Sequence[float]
    by_torch: Callable[..., Sequence[Tensor]]


def coupling(x: Tensor, shared: Tensor, plan: Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """z (B, D) and the log-determinant (B,); None where C++ does not apply.

    Args:
        shared: the parameters (n, parameters) of the numbers that condition, which all rows share.
        tensors: weights and biases of the network's layers, in turn.
    """
    if not dense.applies(x, tensors) or not native.applies(shared) or shared.dtype != x.dtype:
        return None
    if native.load(rational_quadratic.SOURCE) is None:
        return None
    return _Coupling.apply(x, shared, plan, *tensors)


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shared, plan, *tensors):
        h, kept = dense.forward(plan.conditioning(x).contiguous(), plan.kinds, tensors, any(ctx.needs_input_grad))
        theta = per_element(h, shared.shape[-1])
        z, log_slope = rational_quadratic.forward(x, theta, shared, plan.places, plan.settings, False)
        ctx.save_for_backward(x, h, kept, shared, *tensors)
        ctx.plan = plan
        return z, log_slope.sum(1)

    @staticmethod
    def backward(ctx, grad_z, grad_log_det):
        plan, (x, h, kept, shared, *tensors) = ctx.plan, ctx.saved_tensors
        if not gradients.in_place(grad_z, grad_log_det):

            def by_torch():
                return plan.by_torch(x, dense.by_torch(plan.conditioning(x), plan.kinds, tensors), shared)

            needed = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:]]
            found = gradients.by_autograd(by_torch, (x, shared, *tensors), needed, (grad_z, grad_log_det))
            return *found[:2], None, *found[2:]
        given = grad_z, grad_log_det[:, None].expand_as(x)
        theta = per_element(h, shared.shape[-1])
        grad_x, grad_theta, grad_shared = rational_quadratic.backward(
            x, theta, shared, plan.places, *given, plan.settings, False
        )
        grad_h = grad_theta.transpose(1, 2).reshape(h.shape)
        conditioning = plan.conditioning(x).contiguous()
        grad_conditioning, grads = dense.backward(conditioning, kept, grad_h, plan.kinds, tensors, True)
        plan.conditioning(grad_x).add_(grad_conditioning)
        return grad_x, grad_shared, None, *grads
