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
        seen: the places in x (B, D) of the part that the network sees.
        kinds: of the network's layers.
        places, settings: those of :func:`flowtrain.bijections.native.rational_quadratic.spline_of_parts`.
    """

    seen: slice
    kinds: Sequence[int]
    places: Tensor
    settings: Sequence[float]


def coupling(
    x: Tensor, shared: Tensor, plan: Plan, tensors: Sequence[Tensor], by_torch: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """z (B, D) and the log-determinant (B,); None where C++ does not apply.

    Args:
        shared: the parameters (n, parameters) of the numbers that condition, which all rows share.
        tensors: weights and biases of the network's layers, in turn.
        by_torch: the splines by torch's operations, as a function of x, of the network's output and of ``shared``: for
            derivatives of gradients.
    """
    if not dense.applies(x, tensors) or shared.dtype != x.dtype or not rational_quadratic.is_built():
        return None
    if native.as_operator(x, shared):
        seen = [*plan.seen.indices(x.shape[1])]
        return _operator(x, shared, tensors, seen, list(plan.kinds), plan.places, list(plan.settings))[:2]
    return _Coupling.apply(x, shared, plan, by_torch, *tensors) if native.applies(shared) else None


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shared, plan, by_torch, *tensors):
        z, log_det, *kept = _forward(x, shared, plan, tensors, any(ctx.needs_input_grad))
        ctx.save_for_backward(x, shared, *kept, *tensors)
        ctx.plan, ctx.by_torch = plan, by_torch
        return z, log_det

    @staticmethod
    def backward(ctx, *grads):
        plan, (x, shared, h, kept, *tensors) = ctx.plan, ctx.saved_tensors
        if gradients.in_place(*grads):
            grad_x, grad_shared, of_network = _backward(x, shared, h, kept, plan, tensors, *grads)
            return grad_x, grad_shared, None, None, *dense.as_tensors(of_network, tensors)

        def by_torch():
            return ctx.by_torch(x, dense.by_torch(x[:, plan.seen], plan.kinds, tensors), shared)

        needed = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:]]
        found = gradients.by_autograd(by_torch, (x, shared, *tensors), needed, grads)
        return *found[:2], None, None, *found[2:]


def _forward(x, shared, plan: Plan, tensors, keeps: bool):
    """Both results, the network's output, and what its gradient needs if it ``keeps`` that."""
    h, kept = dense.forward(x[:, plan.seen].contiguous(), plan.kinds, tensors, keeps)
    theta = per_element(h, shared.shape[-1])
    z, log_slope = rational_quadratic.forward(x, theta, shared, plan.places, plan.settings, False)
    return z, log_slope.sum(1), h, kept


def _backward(x, shared, h, kept, plan: Plan, tensors, grad_z, grad_log_det) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of ``shared``, and of ``tensors`` as one vector."""
    given, theta = (grad_z, grad_log_det[:, None].expand_as(x)), per_element(h, shared.shape[-1])
    grad_x, grad_theta, grad_shared = rational_quadratic.backward(
        x, theta, shared, plan.places, *given, plan.settings, False
    )
    grad_h = grad_theta.transpose(1, 2).reshape(h.shape)
    seen = x[:, plan.seen].contiguous()
    grad_seen, grads = dense.backward(seen, kept, grad_h, plan.kinds, tensors)
    grad_x[:, plan.seen].add_(grad_seen)
    return grad_x, grad_shared, grads


# ---- for torch.compile, an operator with a gradient


@torch.library.custom_op("flowtrain::spline_coupling", mutates_args=(), device_types="cpu")
def _operator(
    x: Tensor,
    shared: Tensor,
    tensors: list[Tensor],
    seen: list[int],
    kinds: list[int],
    places: Tensor,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, shared, Plan(slice(*seen), kinds, places, tuple(settings)), tensors, True)


@torch.library.custom_op("flowtrain::spline_coupling_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    x: Tensor,
    shared: Tensor,
    h: Tensor,
    kept: Tensor,
    grad_z: Tensor,
    grad_log_det: Tensor,
    tensors: list[Tensor],
    seen: list[int],
    kinds: list[int],
    places: Tensor,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    plan = Plan(slice(*seen), kinds, places, tuple(settings))
    return _backward(x, shared, h, kept, plan, tensors, grad_z, grad_log_det)


@_operator.register_fake
def _(x, shared, tensors, seen, kinds, places, settings):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), *dense.like_forward(x, tensors, kinds)


@_operator_backward.register_fake
def _(x, shared, h, kept, grad_z, grad_log_det, tensors, seen, kinds, places, settings):
    grad_x, grads = dense.like_backward(x, kept, h, tensors, kinds)
    return grad_x, shared.new_empty(shared.shape), grads


def _setup(ctx, inputs, output):
    x, shared, tensors, *ctx.rest = inputs
    ctx.save_for_backward(x, shared, *output[2:], *tensors)


def _gradients(ctx, grad_z, grad_log_det, *_):
    x, shared, h, kept, *tensors = ctx.saved_tensors
    grad_x, grad_shared, grads = _operator_backward(x, shared, h, kept, grad_z, grad_log_det, tensors, *ctx.rest)
    return grad_x, grad_shared, dense.parts_of(grads, tensors), *[None] * 4


_operator.register_autograd(_gradients, setup_context=_setup)
