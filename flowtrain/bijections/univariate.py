"""Monotone maps of one number, with parameters θ that a conditioner supplies.

The review of Papamakarios et al. (2021, section 3.1) calls these maps transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.bijections.native import elementwise_affine

# torch's log1p for AVX-512 (softplus, logsigmoid, expm1) loads a constant under a mask that is empty unless x = −0.
# Until the constant's page of memory has been read, each such load is slow, and the function twenty times slower.
torch.full((64,), -0.0, device="cpu").log1p()


class Univariate(nn.Module):
    """A monotone map y = τ(x; θ) of each element, (nearly) the identity with θ = 0.

    Both directions take elements (B, *shape) and θ (B, *shape, params), or (*shape, params) if all examples share it.
    They return the mapped elements and the logarithm of the derivative of the map just applied, both (B, *shape).

    Attributes:
        params: number of parameters per element.
        smooth: True if the log-derivative has no kinks in x. By default reversible backpropagation keeps x exactly.
        iterative: True if the inverse is found in many steps.

    Args:
        shape: of the elements of one event.
    """

    params: int
    smooth = False
    iterative = False

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx."""
        raise NotImplementedError

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dy."""
        raise NotImplementedError

    def joins(self, other: Univariate) -> bool:
        """Whether ``other`` is the same map, of other numbers, and :meth:`of_parts` may map both."""
        return False

    def of_parts(
        self, x: Tensor, theta: Tensor, shared: Tensor, places: Tensor, in_turn: Callable
    ) -> tuple[Tensor, Tensor] | None:
        """:meth:`forward` of vectors (B, D) of which some numbers have θ (B, n, params), and all rows share that of the
        others, (D − n, params); None where two calls must do it.

        Args:
            places: (D,), i for a number that has ``theta[:, i]`` and −1 − i for one that has ``shared[i]``.
            in_turn: the same function of x, ``theta`` and ``shared`` by two calls.
        """
        return None

    def of_network(
        self,
        x: Tensor,
        shared: Tensor,
        places: Tensor,
        seen: slice,
        layers: tuple[Sequence, Sequence[Tensor]],
        in_turn: Callable,
    ) -> tuple[Tensor, Tensor] | None:
        """:meth:`of_parts` of vectors, and the log-determinant (B,), together with the network that computes θ; None
        where the network must run by itself.

        Args:
            seen: the places in x of the part that the network sees.
            layers: what its ``dense_layers`` returns.
            in_turn: as for :meth:`of_parts`, with the network's output (B, params·n) in place of θ, and the
                log-determinant (B,) in place of its terms.
        """
        return None

    def of_vectors(
        self, x: Tensor, theta: Tensor, places: Tensor | None, inverse: bool, by_torch: Callable
    ) -> tuple[Tensor, Tensor] | None:
        """Vectors (B, D), of which some numbers are mapped with θ (B, n, params) and the others stay, and the
        log-determinant (B,); None where :meth:`forward` or :meth:`inverse` must do it.

        Args:
            places: (n,), of the numbers that are mapped, on the CPU; None: all of them, in order.
            inverse: the direction.
            by_torch: the same function of x and ``theta`` by that method.
        """
        return None

    def guide(self, theta: Tensor, unconditional: Tensor, weight: Tensor) -> Tensor:
        """θ of the map whose density is p·(p/q)ʷ up to a constant, with p that of ``theta`` on a standard normal base
        and q that of ``unconditional``; see :func:`flowtrain.bijections.decoding.guidance`. Raises ValueError where
        there is none."""
        raise ValueError(f"guidance takes univariate=affine_exp, not {type(self).__name__}")


class Additive(Univariate):
    """y = x + t, which keeps volume: NICE's map (Dinh et al. 2015, eq. 9).

    >>> Additive((2,))(torch.zeros(1, 2), torch.tensor([[[1.0], [2.0]]]))[0]
    tensor([[1., 2.]])
    """

    params = 1
    smooth = True

    def forward(self, x, theta):
        return x + theta[..., 0], torch.zeros_like(x)

    def inverse(self, y, theta):
        return y - theta[..., 0], torch.zeros_like(y)


class Scale(Univariate):
    """y = x·exp(s): as an :class:`Elementwise` layer, NICE's diagonal scaling (Dinh et al. 2015, section 3.3).

    The log-determinant is Σs with its sign, not ‖s‖₁. s is clamped to ±``bound``, beyond what data ask for.

    >>> Scale((2,))(torch.ones(1, 2), torch.zeros(1, 2, 1))
    (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    params = 1
    smooth = True
    bound = 30.0

    def forward(self, x, theta):
        s = theta[..., 0].clamp(-self.bound, self.bound)
        return x * s.exp(), s.expand_as(x)

    def inverse(self, y, theta):
        s = theta[..., 0].clamp(-self.bound, self.bound)
        return y * (-s).exp(), (-s).expand_as(y)


class _Affine(Univariate):
    """y = (x + t)·exp(s). θ holds t and a raw number; the subclasses differ in s as a function of that."""

    params = 2
    smooth = True

    def scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """exp(s) and s as functions of the second parameter."""
        raise NotImplementedError

    def forward(self, x, theta):
        t, raw = split_parameters(theta)
        scale, s = self.scale(raw)
        return (x + t) * scale, s.expand_as(x)

    def inverse(self, y, theta):
        t, raw = split_parameters(theta)
        scale, s = self.scale(raw)
        return y / scale - t, (-s).expand_as(y)

    def of_vectors(self, x, theta, places, inverse, by_torch):
        found = self._settings()
        return found and elementwise_affine.affine(x, theta, *found, places, inverse, by_torch)

    def _settings(self) -> tuple[tuple[float, ...], Tensor | None] | None:
        """For C++, those of the scale and its weights; None for a subclass, which may have a scale of its own."""
        return None


class ExpAffine(_Affine):
    """y = (x + t)·exp(s) with s a parameter: MAF's map, a Gaussian with conditional mean and standard deviation
    (Papamakarios et al. 2017, eq. 3).

    Args:
        shape: of the elements.
        bound: s is clamped to ±bound, far outside what data ask for: unbounded, one odd input overflows.

    Raises:
        ValueError: ``bound`` not above 0.

    >>> ExpAffine((2,))(torch.ones(1, 2), torch.zeros(1, 2, 2))
    (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    def __init__(self, shape, bound: float = 10.0):
        super().__init__(shape)
        if not bound > 0:
            raise ValueError(f"bound={bound} must be positive")
        self.bound = bound

    def scale(self, raw):
        s = F.hardtanh(raw, -self.bound, self.bound)  # one kernel each way, where the gradient of clamp takes four
        return s.exp(), s

    def _settings(self):
        return ((elementwise_affine.EXPONENTIAL, self.bound, 0, 0), None) if type(self) is ExpAffine else None

    def guide(self, theta, unconditional, weight):
        (t, s), (t_other, s_other) = split_parameters(theta), split_parameters(unconditional)
        variances = (2 * (self.scale(s_other)[1] - self.scale(s)[1])).exp().clamp(max=1)  # μ = −t, σ = exp(−s)
        precision = 1 + weight - weight * variances
        shift = weight * variances * (t - t_other) / precision
        return torch.stack((t + shift, s + precision.log() / 2), -1)


class SigmoidAffine(_Affine):
    """y = (x + t)·exp(s) with exp(s) = floor + (1 − floor)·sigmoid(θ₂ + 2): Glow's scale (Kingma & Dhariwal 2018,
    reference code).

    Args:
        shape: of the elements.
        floor: the smallest scale. Without it the scale reaches 0 and samples explode.

    Raises:
        ValueError: ``floor`` outside (0, 1).

    >>> SigmoidAffine((2,))(torch.ones(1, 2), torch.zeros(1, 2, 2))[0].shape
    torch.Size([1, 2])
    """

    def __init__(self, shape, floor: float = 1e-3):
        super().__init__(shape)
        if not 0 < floor < 1:
            raise ValueError(f"floor={floor} must lie between 0 and 1")
        self.floor = floor

    def scale(self, raw):
        scale = self.floor + (1 - self.floor) * torch.sigmoid(raw + 2)
        return scale, scale.log()

    def _settings(self):
        return ((elementwise_affine.SIGMOID, self.floor, 1, 2), None) if type(self) is SigmoidAffine else None


class DoubleSigmoidAffine(_Affine):
    """y = (x + t)·exp(s) with exp(s) = floor + 2·(1 − floor)·sigmoid(θ₂), 1 at 0: Jet's scale (Kolesnikov et al. 2024,
    section 3).

    Args:
        shape: of the elements.
        floor: the smallest scale. Without it the scale reaches 0 and samples explode.

    Raises:
        ValueError: ``floor`` outside (0, 1).

    >>> DoubleSigmoidAffine((2,))(torch.ones(1, 2), torch.zeros(1, 2, 2))
    (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    def __init__(self, shape, floor: float = 1e-3):
        super().__init__(shape)
        if not 0 < floor < 1:
            raise ValueError(f"floor={floor} must lie between 0 and 1")
        self.floor = floor

    def scale(self, raw):
        scale = self.floor + 2 * (1 - self.floor) * torch.sigmoid(raw)
        return scale, scale.log()

    def _settings(self):
        return ((elementwise_affine.SIGMOID, self.floor, 2, 0), None) if type(self) is DoubleSigmoidAffine else None


class TanhAffine(_Affine):
    """y = (x + t)·exp(s) with s = rescale·tanh(θ₂): Real NVP's scale (Dinh et al. 2017, section 4.1).

    ``rescale`` is learned for each channel and starts at 1.

    >>> TanhAffine((2,))(torch.ones(1, 2), torch.zeros(1, 2, 2))[0].shape
    torch.Size([1, 2])
    """

    def __init__(self, shape):
        super().__init__(shape)
        channel = (self.shape[0], *[1] * (len(self.shape) - 1))
        self.rescale = nn.Parameter(torch.ones(channel))

    def scale(self, raw):
        s = self.rescale * torch.tanh(raw)
        return s.exp(), s

    def _settings(self):
        return ((elementwise_affine.TANH, 0, 0, 0), self.rescale) if type(self) is TanhAffine else None


class ScaleShift(Univariate):
    """y = scale(θ₂)·x + θ₁, as nflows, normflows and zuko have it: t is added after the scaling.

    Args:
        shape: of the elements.
        scale: "softplus": softplus(θ₂ + log(exp(1 − 10⁻³) − 1)) + 10⁻³, 1 at 0; "sigmoid": sigmoid(θ₂ + 2) + 10⁻³;
            "softclip": exp(s) with s = θ₂/(1 + |θ₂|/log 10³), so that |s| < log 10³.

    Raises:
        ValueError: an unknown ``scale``.

    >>> ScaleShift((2,))(torch.ones(1, 2), torch.zeros(1, 2, 2))[0]
    tensor([[1., 1.]])
    """

    params = 2
    smooth = True
    floor = 1e-3

    def __init__(self, shape, scale: str = "softclip"):
        super().__init__(shape)
        if scale not in ("softplus", "sigmoid", "softclip"):
            raise ValueError(f"scale='{scale}' must be softplus, sigmoid or softclip")
        self.scale = scale

    def forward(self, x, theta):
        t, raw = split_parameters(theta)
        scale, s = self._scale(raw)
        return x * scale + t, s.expand_as(x)

    def inverse(self, y, theta):
        t, raw = split_parameters(theta)
        scale, s = self._scale(raw)
        return (y - t) / scale, (-s).expand_as(y)

    def _scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and its logarithm."""
        if self.scale == "softclip":
            s = soft_clip(raw, self.floor)
            return s.exp(), s
        start = math.log(math.expm1(1 - self.floor))
        scale = (F.softplus(raw + start) if self.scale == "softplus" else torch.sigmoid(raw + 2)) + self.floor
        return scale, scale.log()


def soft_clip(x: Tensor, least: float) -> Tensor:
    """x/(1 + |x|/|log least|), between log least and −log least (zuko)."""
    return x / (1 + (x / math.log(least)).abs())


def per_element(h: Tensor, params: int) -> Tensor:
    """A conditioner's output (B, params·C, …) as θ (B, C, …, params); a view."""
    return h.reshape(h.shape[0], params, h.shape[1] // params, *h.shape[2:]).movedim(1, -1)  # faster than unflatten


def split_parameters(theta: Tensor) -> tuple[Tensor, ...]:
    """θ (…, params) as ``params`` tensors (…); contiguous if a network made them so, and then their gradients too."""
    return theta.unbind(-1) if theta.stride(-1) == 1 else theta.movedim(-1, 1).unbind(1)
