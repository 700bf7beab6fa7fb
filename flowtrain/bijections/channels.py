"""Affine maps of the channels, the same at every pixel. Neighbours are fused into one product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, apply_in_turn, constant_log_det, full_precision
from flowtrain.bijections.native import vector_affine
from flowtrain.runtime import fusion
from flowtrain.runtime.kept import from_weights


class ChannelAffine(Bijection):
    """z = Wx + b for the channels of every pixel, or for the dimensions of a vector.

    ``fusible = True`` promises that ``forward`` and ``inverse`` compute what ``affine`` and ``log_abs_det`` say. As
    with ``reversible``, a subclass with its own ``forward`` or ``inverse`` makes the promise again or is not fused.
    """

    fusible = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if {"forward", "inverse"} & vars(cls).keys() and "fusible" not in vars(cls):
            cls.fusible = False

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.channels, self.pixels = self.shape[0], math.prod(self.shape[1:])

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """W (C, C) and b (C,), or None for 0, in the type of ``like``."""
        raise NotImplementedError

    def then(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W and b of this map and the map of ``weight`` and ``bias`` after it."""
        own_weight, own_bias = self.affine(weight)
        return weight @ own_weight, bias if own_bias is None else F.linear(own_bias, weight, bias)

    def log_abs_det(self) -> Tensor:
        """log|det W|, a scalar."""
        raise NotImplementedError

    def step(self) -> vector_affine.Step | None:
        """This map of vectors as a step of a C++ function, if there is one."""
        return None

    def fuse(self, following):
        if not (_fusible(self) and _fusible(following)):
            return None
        if len(self.shape) > 1:
            return FusedChannelAffine([self, following])
        # a vector is no larger than the layers' matrices, so that their product would cost more
        return FusedVectorAffine.of([self, following])


class FusedVectorAffine:
    """Affine maps of short vectors in turn, by one C++ function. Its parameters are those of its layers."""

    def __init__(self, layers: list[ChannelAffine], steps: list[vector_affine.Step]):
        self.layers, self.steps = layers, steps

    @classmethod
    def of(cls, layers: list[ChannelAffine]) -> FusedVectorAffine | None:
        """The ``layers`` as one; None where a layer is no step of a C++ function, or vectors are too long."""
        if torch.compiler.is_compiling() or not vector_affine.may_apply(layers[0].channels):
            return None
        steps = [step for layer in layers if (step := layer.step())]
        return cls(layers, steps) if len(steps) == len(layers) else None

    def fuse(self, following: Bijection) -> FusedVectorAffine | None:
        # never beyond a product, so that the numbers do not depend on how a chain is divided
        if self.steps[-1].kind == vector_affine.TRIANGULAR or not _fusible(following):
            return None
        return FusedVectorAffine.of([*self.layers, following])

    def __call__(self, x, context=None):
        with full_precision(x):
            return vector_affine.affine(x, self.steps, self._in_turn) or self._in_turn(x)

    def inverse(self, z, context=None):
        return apply_in_turn([layer.inverse for layer in reversed(self.layers)], z, context)

    exact_inputs, recompute = Bijection.exact_inputs, Bijection.recompute

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(layer.parameters() for layer in self.layers)

    def _in_turn(self, x):
        return apply_in_turn(self.layers, x, None)


class FusedChannelAffine:
    """Affine maps of the channels in turn, as a single one. Its parameters are those of its layers."""

    def __init__(self, layers: list[ChannelAffine]):
        self.layers = layers

    def fuse(self, following: Bijection) -> FusedChannelAffine | None:
        return FusedChannelAffine([*self.layers, following]) if _fusible(following) else None

    def __call__(self, x, context=None):
        with full_precision(x):
            weight, bias = from_weights(lambda: self._affine(x), ("affine", x.dtype), *self.layers)
            return mixer(self.layers[0])(x, weight, bias), self._log_det(x)

    def inverse(self, z, context=None):
        with full_precision(z):
            inverse, bias = from_weights(lambda: self._inverse_affine(z), ("inverse", z.dtype), *self.layers)
            return mix_exactly(z, inverse, bias), -self._log_det(z)

    exact_inputs, recompute = Bijection.exact_inputs, Bijection.recompute

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(layer.parameters() for layer in self.layers)

    def _affine(self, like):
        weight, bias = self.layers[-1].affine(like)
        for layer in reversed(self.layers[:-1]):
            weight, bias = layer.then(weight, bias)
        return weight, bias

    def _inverse_affine(self, like):
        weight, bias = self._affine(like)
        inverse = inverse_matrix(weight)
        return inverse, None if bias is None else -(inverse @ bias.double())

    def _log_det(self, x):
        return constant_log_det(from_weights(self._log_abs_det, "log_abs_det", *self.layers), x)

    def _log_abs_det(self):
        first, *others = (layer.log_abs_det() for layer in self.layers)
        return sum(others, first) * self.layers[0].pixels


def _fusible(layer: Bijection) -> TypeGuard[ChannelAffine]:
    return isinstance(layer, ChannelAffine) and layer.fusible and fusion.may_fuse(layer)


def inverse_matrix(matrix: Tensor) -> Tensor:
    """In float64: its error would grow with the matrix's condition. Without torch.linalg.inv's reads of the device."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix.double())
    permutation, lower, upper = torch.lu_unpack(lu, pivots)
    half = torch.linalg.solve_triangular(lower, permutation.T, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, half, upper=True)


def mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight``·x + ``bias`` for the channels of x, axis 1."""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def mix_exactly(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``mix`` with sums in float64, rounded once. An inverse multiplies the roundings of float32 sums by the matrix's
    condition number, and the roundings of the sums that it inverts too."""
    return mix(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def mixer(layer: Bijection) -> Callable[..., Tensor]:
    """The product that ``layer`` uses: the exact one in evaluation, the cheaper one in training."""
    return mix if layer.training else mix_exactly
