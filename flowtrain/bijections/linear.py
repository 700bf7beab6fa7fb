"""Linear maps of the channels, the same at every pixel: invertible 1×1 convolutions and permutations.

On vectors they are linear layers: the dimensions are the channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, constant_log_det, full_precision, walk, zero_log_det
from flowtrain.bijections.channels import (
    ChannelAffine,
    Maps,
    compute_together,
    fused_links,
    inverse_matrix,
    mix_exactly,
    mixer,
)
from flowtrain.bijections.native.vector_affine import PERMUTE, TRIANGULAR, Step
from flowtrain.runtime import modes
from flowtrain.runtime.kept import from_weights


def start_matrix(kind: str, n: int) -> Tensor:
    """A random n×n ``rotation`` (Haar-distributed), ``permutation``, or the ``identity``, in float64 on the CPU."""
    if kind in ("identity", "whitening"):
        return torch.eye(n, dtype=torch.float64, device="cpu")
    if kind == "permutation":
        return torch.eye(n, dtype=torch.float64, device="cpu")[torch.randperm(n, device="cpu")]
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, device="cpu"))
    q = q * r.diagonal().sign()  # QR alone is not Haar-distributed
    q[:, 0] *= torch.linalg.det(q).sign()  # determinant +1
    return q


def whitening_matrix(x: Tensor) -> Tensor:
    """The matrix that makes the channels of ``x`` (B, C, …) uncorrelated with variance 1, sorted by their variance
    before; (C, C), float64."""
    rows = x.movedim(1, -1).flatten(0, -2).double()
    channels = x.shape[1]
    covariance = torch.cov(rows.T, correction=0).reshape(channels, channels)
    # with fewer rows than channels some directions have no variance: shrink towards equal ones, less with more rows
    shrinkage = min(1.0, (channels / len(rows)) ** 2)
    even = covariance.diagonal().mean() * torch.eye(channels, dtype=covariance.dtype, device=x.device)
    variance, axes = torch.linalg.eigh(covariance.lerp(even, shrinkage))
    variance, axes = variance.flip(0), axes.flip(1)
    return variance.clamp(min=1e-6 * variance[0]).rsqrt()[:, None] * axes.T


class _Linear(ChannelAffine):
    """z = Wx for every pixel; the log-determinant is pixels · log|det W|."""

    fusible = reversible = True
    started: Tensor

    def __init__(self, shape, start: str = "rotation", context_shape=None):
        super().__init__(shape, context_shape)
        if start not in ("rotation", "permutation", "identity", "whitening"):
            raise ValueError(f"start='{start}' must be rotation, permutation, identity or whitening")
        self.register_buffer("started", torch.tensor(start != "whitening"))
        self.allocate()
        if not next(self.parameters()).is_meta:  # a meta tensor has no numbers
            self.set_weight(start_matrix(start, self.channels))

    def allocate(self) -> None:
        """Create the parameters."""
        raise NotImplementedError

    def set_weight(self, matrix: Tensor) -> None:
        """Set W to ``matrix``, float64."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """W (C, C)."""
        raise NotImplementedError

    def weight_inverse(self) -> Tensor:
        """W⁻¹ in float64."""
        return inverse_matrix(self.weight())

    @torch.no_grad()
    def start(self, x: Tensor, inverse: bool = False) -> None:
        """Set W to whiten a batch, which is the input of ``forward``, or of ``inverse``."""
        matrix = whitening_matrix(x)
        self.set_weight(torch.linalg.inv(matrix) if inverse else matrix)
        self.started.fill_(True)

    def forward(self, x, context=None):
        with full_precision(x):
            weight, log_det = from_weights(self.weight, "weight", self), self._kept_log_abs_det()
            return mixer(self)(x, weight), constant_log_det(self.pixels * log_det, x)

    def inverse(self, z, context=None):
        with full_precision(z):
            inverse, log_det = from_weights(self.weight_inverse, "inverse", self), self._kept_log_abs_det()
            return mix_exactly(z, inverse), constant_log_det(-self.pixels * log_det, z)

    def _kept_log_abs_det(self) -> Tensor:
        return from_weights(self.log_abs_det, "log_abs_det", self)


class DenseLinear(_Linear):
    """z = Wx for every pixel, W a parameter: Glow's 1×1 convolution (Kingma & Dhariwal 2018, eq. 9).

    log|det W| comes from an LU decomposition in float64, each time. In a flow, all matrices of one size share it:
    see :func:`stacked_weights`.

    Args:
        shape: of one event, (C, …).
        start: W at the start: a random "rotation", a "permutation", the "identity", or "whitening", computed from data
            by :meth:`flowtrain.flow.Flow.initialize`.
        context_shape: not used.

    Raises:
        ValueError: an unknown ``start``.

    >>> DenseLinear((3, 8, 8))(torch.randn(5, 3, 8, 8))[0].shape
    torch.Size([5, 3, 8, 8])
    """

    def allocate(self):
        self.matrix = nn.Parameter(torch.empty(self.channels, self.channels))

    @torch.no_grad()
    def set_weight(self, matrix):
        self.matrix.copy_(matrix)

    def weight(self):
        return self.matrix

    def maps(self):
        return _Matrices(self.matrix)

    def log_abs_det(self):
        stacked = modes.current().log_dets
        return stacked[self] if stacked is not None and self in stacked else super().log_abs_det()


class _Matrices(Maps):
    def affine(self, like):
        return self.tensors[0], None

    def log_abs_det(self):
        return torch.linalg.slogdet(self.tensors[0].double())[1]


def dense_layers(bijection: Bijection) -> Iterator[DenseLinear]:
    """Each DenseLinear in ``bijection``, but for those inside of what is compiled by itself, with its own inputs."""
    if bijection._compiled_call_impl is not None:
        return
    if isinstance(bijection, DenseLinear):
        yield bijection
    for layer in bijection.layers().values():
        yield from dense_layers(layer)


def stacked_weights(bijection: Bijection) -> AbstractContextManager[None]:
    """Within it, what follows from weights alone comes from one computation for all layers of ``bijection`` of one
    size, which takes little longer than that for one: the products of neighbouring affine maps of channels, and
    log|det W| of each other :class:`DenseLinear`."""
    links = [*fused_links(bijection)]
    layers = [layer for link in links for layer in link.layers]
    others = [layer for layer in dense_layers(bijection) if layer not in {*layers}]
    with full_precision(next(bijection.parameters(), torch.empty(0))):
        affines = from_weights(lambda: compute_together(links), "affines", *layers) if links else None
        log_dets = from_weights(lambda: _log_dets(others), "log_dets", *others) if others else None
    return modes.using(affines=affines, log_dets=log_dets)


def stacks(bijection: Bijection) -> bool:
    """Whether :func:`stacked_weights` may change something."""
    layers = [layer for layer, _ in walk(bijection)]
    return any(isinstance(one, ChannelAffine) and len(one.shape) > 1 or isinstance(one, DenseLinear) for one in layers)


def _log_dets(layers: list[DenseLinear]) -> dict[nn.Module, Tensor]:
    alike: dict[tuple, list[DenseLinear]] = {}
    for layer in layers:
        alike.setdefault((layer.channels, layer.matrix.dtype, layer.matrix.device), []).append(layer)
    log_dets: dict[nn.Module, Tensor] = {}
    for group in alike.values():
        matrices = torch.stack([layer.matrix for layer in group])
        log_dets.update(zip(group, _Matrices(matrices).log_abs_det().unbind()))
    return log_dets


class LULinear(_Linear):
    """z = Wx for every pixel, W = P·L·U with P and the signs of U's diagonal fixed (Kingma & Dhariwal 2018, eq. 10).

    One matrix (C, C) holds the parameters: L below its diagonal, U above it, log|diag U| on it, with sum log|det W|.

    Args:
        shape: of one event, (C, …).
        start: W at the start: a random "rotation", a "permutation", the "identity", or "whitening", computed from data
            by :meth:`flowtrain.flow.Flow.initialize`.
        context_shape: not used.

    Raises:
        ValueError: an unknown ``start``.

    >>> LULinear((3, 8, 8))(torch.randn(5, 3, 8, 8))[0].shape
    torch.Size([5, 3, 8, 8])
    """

    fusible = reversible = True
    sign: Tensor
    order: Tensor

    def allocate(self):
        self.lu = nn.Parameter(torch.empty(self.channels, self.channels))
        self.register_buffer("sign", torch.ones(self.channels))
        self.register_buffer("order", torch.tensor([*range(self.channels)]))  # row i of W is row order[i] of L·U

    @torch.no_grad()
    def set_weight(self, matrix):
        permutation, lower, upper = torch.linalg.lu(matrix)
        diagonal = upper.diagonal()
        self.lu.copy_(lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag())
        self.sign.copy_(diagonal.sign())
        self.order.copy_(permutation.argmax(1))

    def maps(self):
        return _Factors(self.lu, self.sign, self.order)

    def factors(self) -> tuple[Tensor, Tensor]:
        """L without its diagonal of ones, and U."""
        return self.maps().factors()

    def _exact_factors(self) -> tuple[Tensor, Tensor]:
        """The factors in float64."""
        lower, upper = from_weights(self.factors, "factors", self)
        return lower.double(), upper.double()

    def weight(self):
        return self.affine(self.lu)[0]

    def vector_step(self):
        return Step(TRIANGULAR, self.order, self.lu, self.sign)

    # a vector is multiplied by one factor after the other, which needs no product and no inverse of matrices; an image,
    # with its many pixels, is multiplied by their product

    def forward(self, x, context=None):
        if x.dim() > 2:
            return super().forward(x, context)
        with full_precision(x):
            lower, upper = self.factors() if self.training else self._exact_factors()
            h = F.linear(x.to(upper.dtype), upper)
            z = torch.addmm(h, h, lower.T).index_select(1, self.order).to(x.dtype)
            return z, constant_log_det(self.log_abs_det(), x)

    def inverse(self, z, context=None):
        if z.dim() > 2:
            return super().inverse(z, context)
        with full_precision(z):
            lower, upper = self._exact_factors()
            x = z.index_select(1, self.order.argsort()).T.double()
            x = torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=True)
            x = torch.linalg.solve_triangular(upper, x, upper=True).T.to(z.dtype)
            return x, constant_log_det(-self.log_abs_det(), z)


class _Factors(Maps):
    """Of ``lu``, ``sign`` and ``order``."""

    def factors(self):
        lu, sign, _ = self.tensors
        diagonal = lu.diagonal(dim1=-2, dim2=-1)
        return lu.tril(-1), lu.triu(1) + torch.diag_embed(sign * diagonal.exp())

    def affine(self, like):
        lower, upper = self.factors()
        rows = self.tensors[2].unsqueeze(-1).expand(upper.shape)
        return (upper + lower @ upper).gather(-2, rows), None

    def log_abs_det(self):
        return self.tensors[0].diagonal(dim1=-2, dim2=-1).sum(-1)


class Permutation(ChannelAffine):
    """Channel i of z is channel ``order[i]`` of x.

    Args:
        shape: of one event, (C, …).
        order: C integers.
        context_shape: not used.

    Raises:
        ValueError: an ``order`` that does not name each channel once.

    >>> Permutation((3,), [2, 0, 1])(torch.tensor([[1.0, 2.0, 3.0]]))[0]
    tensor([[3., 1., 2.]])
    """

    fusible = reversible = True
    order: Tensor
    back: Tensor

    def __init__(self, shape, order, context_shape=None):
        super().__init__(shape, context_shape)
        order = torch.as_tensor(order, device="cpu")
        if order.sort().values.tolist() != list(range(self.shape[0])):
            raise ValueError(f"order must name each of the {self.shape[0]} channels once")
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, x, context=None):
        return x.index_select(1, self.order), zero_log_det(x)  # cheaper to differentiate than indexing

    def inverse(self, z, context=None):
        return z.index_select(1, self.back), zero_log_det(z)

    def maps(self):
        return _Orders(self.order, self.back)

    def vector_step(self):
        return Step(PERMUTE, self.order)


class _Orders(Maps):
    """Of ``order`` and ``back``."""

    def affine(self, like):
        order, _ = self.tensors
        return torch.eye(order.shape[-1], device=like.device, dtype=like.dtype)[order], None

    def then(self, weight, bias):
        columns = self.tensors[1].unsqueeze(-2).expand(weight.shape)
        return weight.gather(-1, columns), bias

    def log_abs_det(self):
        order, _ = self.tensors
        return torch.zeros(order.shape[:-1], device=order.device)


class Reverse(Permutation):
    """The channels in reverse order.

    >>> Reverse((3,))(torch.tensor([[1.0, 2.0, 3.0]]))[0]
    tensor([[3., 2., 1.]])
    """

    fusible = reversible = True

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, range(shape[0] - 1, -1, -1), context_shape)

    def forward(self, x, context=None):
        return x.flip(1), zero_log_det(x)

    inverse = forward


class Shuffle(Permutation):
    """The channels in a random order, which is drawn by the constructor and saved in the state.

    >>> Shuffle((3, 8, 8))(torch.randn(5, 3, 8, 8))[0].shape
    torch.Size([5, 3, 8, 8])
    """

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, torch.randperm(shape[0], device="cpu"), context_shape)


class DiagonalFirst(Permutation):
    """The channels of a squeezed image by position in the 2×2 block: both diagonal ones first, then the other two.

    After it, the half of the channels that a multi-scale flow keeps is one colour of a checkerboard of the image
    before the squeeze (Dinh et al. 2017, section 3.6, and its reference code).

    Raises:
        ValueError: a number of channels that is no multiple of 4.

    >>> DiagonalFirst((12, 4, 4))(torch.randn(5, 12, 4, 4))[0].shape
    torch.Size([5, 12, 4, 4])
    """

    def __init__(self, shape, context_shape=None):
        channels, odd = divmod(shape[0], 4)
        if odd:
            raise ValueError(f"{shape[0]} channels are not those of a squeezed image")
        order = [4 * channel + position for position in (0, 3, 1, 2) for channel in range(channels)]
        super().__init__(shape, order, context_shape)
