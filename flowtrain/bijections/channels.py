"""Affine maps of the channels, the same at every pixel; those that follow each other become one product."""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision
from flowtrain.runtime import fusion


class ChannelAffine(Bijection):
    """z = Wx + b for the channels of every pixel, or for the dimensions of a vector.

    Whoever defines ``forward`` or ``inverse`` says with ``joins = True`` that they do what ``affine`` and
    ``log_abs_det`` tell: otherwise they are called, and nothing is joined.
    """

    joins = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if {"forward", "inverse"} & vars(cls).keys() and "joins" not in vars(cls):
            cls.joins = False

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.channels, self.pixels = self.shape[0], math.prod(self.shape[1:])

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """W and b (None: 0), of the type of ``like``."""
        raise NotImplementedError

    def before(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W and b of this map followed by that of ``weight`` and ``bias``."""
        own_weight, own_bias = self.affine(weight)
        return weight @ own_weight, bias if own_bias is None else F.linear(own_bias, weight, bias)

    def log_abs_det(self) -> Tensor | float:
        """log|det W|, a scalar."""
        raise NotImplementedError

    def join(self, following):
        # not a vector's layers: a vector is no larger than their matrices
        return Joined([self, following]) if _join(self) and _join(following) and len(self.shape) > 1 else None


class Joined:
    """Affine maps of the channels one after the other as a single one. It has no parameters but those of its layers."""

    def __init__(self, layers: list[ChannelAffine]):
        self.layers = layers

    def join(self, following):
        return Joined([*self.layers, following]) if _join(following) else None

    def __call__(self, x, context=None):
        with full_precision(x):
            return mixer(self.layers[0])(x, *self._affine(x)), self._log_det(x)

    def inverse(self, z, context=None):
        with full_precision(z):
            weight, bias = self._affine(z)
            back = inverse(weight)
            bias = None if bias is None else -(back @ bias.double())
            return mix_exactly(z, back, bias), -self._log_det(z)

    clues, retrace = Bijection.clues, Bijection.retrace

    def parameters(self):
        return chain.from_iterable(layer.parameters() for layer in self.layers)

    def _affine(self, like):
        weight, bias = self.layers[-1].affine(like)
        for layer in reversed(self.layers[:-1]):
            weight, bias = layer.before(weight, bias)
        return weight, bias

    def _log_det(self, x):
        first, *others = (layer.log_abs_det() for layer in self.layers)
        return constant_log_det(sum(others, first) * self.layers[0].pixels, x)


def _join(layer: Bijection) -> bool:
    return isinstance(layer, ChannelAffine) and layer.joins and not fusion.separate(layer)


def inverse(matrix: Tensor) -> Tensor:
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
    condition, and those of the sums that it undoes."""
    return mix(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)


def mixer(layer: Bijection):
    """What ``layer`` mixes by: exactly in evaluation, at the least cost in training."""
    return mix if layer.training else mix_exactly
