"""Affine maps of the channels, the same at every pixel. Neighbours are fused into one product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, Chain, apply_in_turn, constant_log_det, full_precision, fuse
from flowtrain.bijections.native import vector_affine
from flowtrain.bijections.step import FusedStep, may_end_step, separate
from flowtrain.runtime import fusion, modes
from flowtrain.runtime.kept import from_weights


class Maps:
    """Affine maps of the channels, z = Wx + b, as functions of ``tensors``.

    The tensors may have more axes in front, those of several layers that are computed at once.
    """

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """W (…, C, C) and b (…, C), or None for 0, in the type of ``like``."""
        raise NotImplementedError

    def then(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W and b of these maps and the maps of ``weight`` and ``bias`` after them."""
        own_weight, own_bias = self.affine(weight)
        own = None if own_bias is None else apply(weight, own_bias)
        return weight @ own_weight, add(own, bias)

    def log_abs_det(self) -> Tensor:
        """log|det W|, (…)."""
        raise NotImplementedError


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

    def maps(self) -> Maps:
        """The map as a function of the layer's tensors. A subclass with another map has a method of its own, or is not
        computed together with others."""
        raise NotImplementedError

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """W (C, C) and b (C,), or None for 0, in the type of ``like``."""
        return self.maps().affine(like)

    def then(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W and b of this map and the map of ``weight`` and ``bias`` after it."""
        return self.maps().then(weight, bias)

    def log_abs_det(self) -> Tensor:
        """log|det W|, a scalar."""
        return self.maps().log_abs_det()

    def vector_step(self) -> vector_affine.Step | None:
        """This map of vectors as a step of a C++ function, if there is one."""
        return None

    def fuse(self, following):
        if not (_fusible(self) and _fusible(following)):
            return None
        if len(self.shape) > 1:
            return FusedChannelAffine([self, following])
        # a vector is no larger than the layers' matrices, so that their product would cost more
        return FusedVectorAffine.of(self, following)


class FusedVectorAffine:
    """Affine maps of short vectors in turn, by one C++ function. Its parameters are those of its layers."""

    def __init__(self, layers: list[ChannelAffine], steps: list[vector_affine.Step]):
        self.layers, self.steps = layers, steps

    @classmethod
    def of(cls, layer: ChannelAffine, following: ChannelAffine) -> FusedVectorAffine | None:
        """Both as one; None where one is no step of a C++ function, or vectors are too long."""
        if torch.compiler.is_compiling() or not vector_affine.may_apply(layer.channels):
            return None
        first, second = layer.vector_step(), following.vector_step()
        return cls([layer, following], [first, second]) if first and second else None

    def fuse(self, following: Bijection) -> FusedVectorAffine | None:
        # never beyond a product, so that the numbers do not depend on how a chain is divided
        if self.steps[-1].kind == vector_affine.TRIANGULAR or not _fusible(following):
            return None
        step = following.vector_step()
        return FusedVectorAffine([*self.layers, following], [*self.steps, step]) if step else None

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


Affine = tuple[Tensor, Tensor | None, Tensor]  # W, b and the log-determinant of an image, of one layer or of several


class FusedChannelAffine:
    """Affine maps of the channels in turn, as a single one. Its parameters are those of its layers."""

    def __init__(self, layers: list[ChannelAffine]):
        self.layers, self.pixels = layers, layers[0].pixels

    def fuse(self, following: Bijection) -> FusedChannelAffine | FusedStep | None:
        if may_end_step(following):
            return FusedStep(self, following)
        return FusedChannelAffine([*self.layers, following]) if _fusible(following) else None

    def __call__(self, x, context=None):
        with full_precision(x):
            weight, bias, log_det = self.affine(x)
            return mixer(self.layers[0])(x, weight, bias), constant_log_det(log_det, x)

    def inverse(self, z, context=None):
        with full_precision(z):
            inverse, bias = from_weights(lambda: self._inverse_affine(z), ("inverse", z.dtype), *self.layers)
            return mix_exactly(z, inverse, bias), constant_log_det(-self.affine(z)[2], z)

    exact_inputs, recompute = Bijection.exact_inputs, Bijection.recompute

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(layer.parameters() for layer in self.layers)

    def affine(self, like: Tensor) -> Affine:
        """W and b in the type of ``like``, and the log-determinant."""
        together = modes.current().affines
        if together is not None and (found := together.get(tuple(self.layers))) is not None:
            return found
        return from_weights(lambda: compose(self.layers, like, self.pixels), ("affine", like.dtype), *self.layers)

    def _inverse_affine(self, like):
        weight, bias, _ = self.affine(like)
        inverse = inverse_matrix(weight)
        return inverse, None if bias is None else -(inverse @ bias.double())


def compose(maps: Sequence[ChannelAffine | Maps], like: Tensor, pixels: int) -> Affine:
    """Maps in turn as a single one of images of so many ``pixels``."""
    weight, bias = maps[-1].affine(like)
    for one in reversed(maps[:-1]):
        weight, bias = one.then(weight, bias)
    first, *others = (one.log_abs_det() for one in maps)
    return weight, bias, sum(others, first) * pixels


def fused_links(bijection: Bijection) -> Iterator[FusedChannelAffine]:
    """The fused maps in the chains of ``bijection``, but for those inside of what is compiled by itself, with its own
    inputs."""
    if not bijection.container or bijection._compiled_call_impl is not None:
        return
    if isinstance(bijection, Chain):
        yield from (link for link in separate(fuse(bijection)) if isinstance(link, FusedChannelAffine))
    for layer in bijection.layers().values():
        yield from fused_links(layer)


def compute_together(links: Iterable[FusedChannelAffine]) -> dict[tuple[Bijection, ...], Affine]:
    """W, b and the log-determinant of each link, by its layers: all of one size in the operations of a single one."""
    alike: dict[tuple, list[tuple[FusedChannelAffine, list[Maps]]]] = {}
    for link in links:
        if all("maps" in vars(type(layer)) for layer in link.layers):
            maps = [layer.maps() for layer in link.layers]
            tensors = ((one.shape, one.dtype, one.device) for part in maps for one in part.tensors)
            alike.setdefault((link.pixels, *map(type, maps), *tensors), []).append((link, maps))
    found: dict[tuple[Bijection, ...], Affine] = {}
    for group in alike.values():
        some, each = zip(*group)
        maps = [
            type(same[0])(*(torch.stack(tensors) for tensors in zip(*(one.tensors for one in same))))
            for same in zip(*each)
        ]
        like = next((tensor for one in maps for tensor in one.tensors if tensor.is_floating_point()), None)
        if like is not None:  # some of them have weights
            weight, bias, log_det = compose(maps, like, some[0].pixels)
            biases = [None] * len(some) if bias is None else bias.unbind()
            found.update(zip((tuple(link.layers) for link in some), zip(weight.unbind(), biases, log_det.unbind())))
    return found


def _fusible(layer: Bijection) -> TypeGuard[ChannelAffine]:
    return isinstance(layer, ChannelAffine) and layer.fusible and not fusion.have_hooks(layer)


def inverse_matrix(matrix: Tensor) -> Tensor:
    """In float64: its error would grow with the matrix's condition. Without torch.linalg.inv's reads of the device."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix.double())
    permutation, lower, upper = torch.lu_unpack(lu, pivots)
    half = torch.linalg.solve_triangular(lower, permutation.T, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, half, upper=True)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two vectors that may be None for 0."""
    return b if a is None else a if b is None else a + b


def apply(weight: Tensor, v: Tensor) -> Tensor:
    """``weight``·v of matrices (…, C, C) and vectors (…, C)."""
    return (weight @ v.unsqueeze(-1)).squeeze(-1)


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
