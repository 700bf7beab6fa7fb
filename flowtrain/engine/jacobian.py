"""Log-determinants from Jacobians by autograd, and copies of layers that are small enough for that."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.bijections import Bijection, Support
from flowtrain.bijections.bijection import size
from flowtrain.bijections.ode import EXACT_LIMIT, continuous_layers, exact_trace

_AT_ONCE = 2**16  # numbers in a batch of copies, for a layer of up to _WEIGHTS weights
_WEIGHTS = 2**20  # a larger layer keeps more activations
_SIDES = (4, 8, 16, 32, 64, 2, 1)  # of smaller images, by preference: with one pixel a wrong number of pixels hides


@dataclass(frozen=True)
class Piece:
    """A bijection, or a module with its shape and its two methods, with events and contexts for it."""

    name: str
    layer: Any  # a Bijection, or a module like one
    x: Tensor
    context: Tensor | None

    @property
    def dimensions(self) -> int:
        return size(self.layer.shape)

    def first(self, n: int) -> Piece:
        """The piece with its first ``n`` events."""
        return replace(self, x=self.x[:n], context=None if self.context is None else self.context[:n])


def log_abs_det(
    function: Callable,
    x: Tensor,
    context: Tensor | None = None,
    at_once: int = _AT_ONCE,
    project: Callable[[Tensor], Tensor] = lambda jacobian: jacobian,
) -> Tensor:
    """log|det ∂y/∂x| of ``y, _ = function(x, context)`` for each example, (B,), by autograd and LU.

    The Jacobian's rows are computed in chunks: a batch holds copies of one example, ``at_once`` numbers together, and
    each copy gives the gradient of another output. A singular Jacobian gives −inf. ``project`` makes it square.
    """
    contexts = [None] * len(x) if context is None else context
    return torch.stack([_log_abs_det(function, *pair, at_once, project) for pair in zip(x, contexts)])


def _log_abs_det(
    function: Callable, x: Tensor, context: Tensor | None, at_once: int, project: Callable[[Tensor], Tensor]
) -> Tensor:
    copies = max(1, min(x.numel(), at_once // x.numel()))
    at = x.expand(copies, *x.shape).clone().requires_grad_()
    with torch.enable_grad():
        y = function(at, None if context is None else context.expand(copies, *context.shape))[0].flatten(1)
    dims, rows = y.shape[1], []
    for first in range(0, dims, copies):
        here = min(copies, dims - first)
        one_hot = torch.zeros_like(y)
        one_hot[range(here), range(first, first + here)] = 1
        (gradient,) = torch.autograd.grad(y, at, one_hot, retain_graph=first + here < dims)
        rows.append(gradient.flatten(1)[:here])
    return torch.linalg.slogdet(project(torch.cat(rows)))[1]


def log_det_errors(piece: Piece) -> tuple[Tensor, Tensor]:
    """|log-det − that of the Jacobian| of ``forward`` and of ``inverse``, each (B,), in nats per dimension.

    One Jacobian serves both directions, that of the cheaper one: if the round trip is right, the other Jacobian is its
    inverse. An ODE's trace is exact, and its Jacobian that of the solver's steps.
    """
    layer, x, context, dims = piece.layer, piece.x, piece.context, piece.dimensions
    support = layer if isinstance(layer, Support) else getattr(layer, "support", None)
    if support is not None and support.out_shape == support.shape:
        support = None
    with exact_trace():
        z, log_det = layer.forward(x, context)
        _, inverse_log_det = layer.inverse(z, context)
    weights = sum(parameter.numel() for parameter in layer.parameters())
    at_once = _AT_ONCE * _WEIGHTS // max(weights, _WEIGHTS)
    if dims > 64 and 4 * _seconds(layer.inverse, z, context) < _seconds(layer.forward, x, context):
        true = -log_abs_det(layer.inverse, z, context, at_once, lambda jacobian: _rows(support, jacobian))
    else:
        true = log_abs_det(layer.forward, x, context, at_once, lambda jacobian: _columns(support, jacobian))
    return (log_det - true).abs() / dims, (inverse_log_det + true).abs() / dims


def _rows(support: Support | None, jacobian: Tensor) -> Tensor:
    """The Jacobian of the free coordinates of points that have more numbers, in z."""
    return jacobian if support is None else support.free(jacobian.T).T


def _columns(support: Support | None, jacobian: Tensor) -> Tensor:
    """The Jacobian of z in the free coordinates of points that have more numbers."""
    if support is None:
        return jacobian
    free = support.free(torch.eye(jacobian.shape[1]).to(jacobian)).shape[1]
    ones = torch.eye(free).to(jacobian)
    return jacobian @ (support.lift(ones) - support.lift(torch.zeros_like(ones))).T


def _seconds(function: Callable, x: Tensor, context: Tensor | None) -> float:
    start = time.perf_counter()
    function(x[:1], None if context is None else context[:1])[0].sum().item()
    return time.perf_counter() - start


def shrink(piece: Piece, limit: int) -> Piece | None:
    """``piece``, or a copy of its layer with the same weights on the corner of its events that is cheapest to audit.

    The copy of a layer of images comes from the same constructor with sides of 4 pixels, or others where it does not
    accept those. None if the layer accepts no events of at most ``limit`` dimensions, or an ODE has too many.
    """
    layer, shape = piece.layer, piece.layer.shape
    limit = max_dimensions(layer, limit)
    if isinstance(layer, Bijection) and len(shape) == 3:
        for side in (2, *_SIDES) if continuous_layers(layer) else _SIDES:  # an ODE is expensive
            if side < max(shape[1:]) and shape[0] * side**2 <= limit and (small := _rebuild(layer, side)):
                context = piece.context
                if context is not None and _has_context_map(small):
                    context = context[..., :side, :side]
                return Piece(piece.name, small, piece.x[..., :side, :side], context)
    return piece if piece.dimensions <= limit else None


def max_dimensions(layer: nn.Module, limit: int) -> int:
    """The most dimensions of a Jacobian of ``layer``: ``limit``, or fewer for an ODE."""
    return min(limit, EXACT_LIMIT) if continuous_layers(layer) else limit


def _rebuild(layer: Bijection, side: int) -> Bijection | None:
    """A copy of the layer for square events of ``side`` pixels, in float64; None if its weights depend on the sides."""
    args, kwargs = layer.init_arguments
    bound = inspect.signature(type(layer)).bind(*args, **kwargs)
    bound.arguments["shape"] = (layer.shape[0], side, side)
    if _has_context_map(layer):
        bound.arguments["context_shape"] = (layer.context_shape[0], side, side)
    like = next(iter(layer.state_dict().values()), torch.zeros(()))
    try:
        small = type(layer)(*bound.args, **bound.kwargs).double().to(like.device).eval()
        small.load_state_dict(layer.state_dict())
    except (ValueError, RuntimeError):  # sides that cannot be halved, or weights of another shape
        return None
    for new, old in zip(continuous_layers(small), continuous_layers(layer)):
        for name in ("rtol", "atol", "max_steps", "steps", "adjoint"):
            setattr(new, name, getattr(old, name))
    return small.requires_grad_(False)


def _has_context_map(layer: Bijection) -> bool:
    """Whether the layer's context is an image of the same sides."""
    return layer.context_shape is not None and tuple(layer.context_shape[1:]) == tuple(layer.shape[1:])
