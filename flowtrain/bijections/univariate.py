"""Monotone maps of one number, whose parameters θ a conditioner supplies.

``shape`` is that of the elements a map acts on. θ is ``(*elements, params)``, without the batch's axis where all
examples share it; ``forward`` and ``inverse`` return the mapped elements and the log-derivative of the map just
applied, both of x's shape. With θ = 0 each is (nearly) the identity. The review of Papamakarios et al. (2021,
section 3.1) calls these maps transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# torch's log1p for AVX-512 (softplus, logsigmoid, expm1) loads a constant under a mask that is empty but for x = −0.
# Until the page of memory that holds it has once been read, each such load is slow: twenty times for the function.
torch.full((64,), -0.0, device="cpu").log1p()


class Univariate(nn.Module):
    params: int
    smooth = True  # False where the log-derivative has kinks

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Additive(Univariate):
    """y = x + t: volume-preserving, NICE's map (Dinh et al. 2015, eq. 9)."""

    params = 1

    def forward(self, x, theta):
        return x + theta[..., 0], torch.zeros_like(x)

    def inverse(self, y, theta):
        return y - theta[..., 0], torch.zeros_like(y)


class Scale(Univariate):
    """y = x·exp(s): with parameters of its own, NICE's diagonal scaling (Dinh et al. 2015, section 3.3).

    Its log-determinant is Σs with its sign, not ‖s‖₁. s is clamped at ±``bound``, beyond what any data ask for.
    """

    params = 1
    bound = 30.0

    def forward(self, x, theta):
        s = theta[..., 0].clamp(-self.bound, self.bound)
        return x * s.exp(), s.expand_as(x)

    def inverse(self, y, theta):
        s = theta[..., 0].clamp(-self.bound, self.bound)
        return y * (-s).exp(), (-s).expand_as(y)


class _Affine(Univariate):
    """y = (x + t)·exp(s); the classes below differ in how s comes from what the conditioner says."""

    params = 2

    def scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """exp(s) and s."""
        raise NotImplementedError

    def forward(self, x, theta):
        t, raw = apart(theta)
        scale, s = self.scale(raw)
        return (x + t) * scale, s.expand_as(x)

    def inverse(self, y, theta):
        t, raw = apart(theta)
        scale, s = self.scale(raw)
        return y / scale - t, (-s).expand_as(y)


class ExpAffine(_Affine):
    """s is what the conditioner says: a Gaussian with conditioned mean and standard deviation.

    ``bound`` clamps s, far outside what data ask for: unbounded, one odd input overflows.
    """

    def __init__(self, shape, bound: float = 10.0):
        super().__init__(shape)
        if not bound > 0:
            raise ValueError(f"bound={bound} must be positive")
        self.bound = bound

    def scale(self, raw):
        s = raw.clamp(-self.bound, self.bound)
        return s.exp(), s


class SigmoidAffine(_Affine):
    """exp(s) = floor + (1 − floor)·sigmoid(raw + 2), Glow's scale (Kingma & Dhariwal 2018, reference code).

    ``floor`` bounds the inverse: without it the scale reaches 0 and samples explode.
    """

    def __init__(self, shape, floor: float = 1e-3):
        super().__init__(shape)
        if not 0 < floor < 1:
            raise ValueError(f"floor={floor} must lie between 0 and 1")
        self.floor = floor

    def scale(self, raw):
        scale = self.floor + (1 - self.floor) * torch.sigmoid(raw + 2)
        return scale, scale.log()


class TanhAffine(_Affine):
    """s = rescale·tanh(raw), ``rescale`` learned for each channel, 1 at the start (Dinh et al. 2017, section 4.1)."""

    def __init__(self, shape):
        super().__init__(shape)
        channel = (self.shape[0], *[1] * (len(self.shape) - 1))
        self.rescale = nn.Parameter(torch.ones(channel))

    def scale(self, raw):
        s = self.rescale * torch.tanh(raw)
        return s.exp(), s


def per_element(h: Tensor, params: int) -> Tensor:
    """A conditioner's output (B, params·C, …) as θ (B, C, …, params); a view."""
    return h.unflatten(1, (params, -1)).movedim(1, -1)


def apart(theta: Tensor) -> list[Tensor]:
    """Each of the parameters of θ by itself; in one piece in memory where a network wrote them so, and then their
    gradients too."""
    return theta.unbind(-1) if theta.stride(-1) == 1 else theta.movedim(-1, 1).unbind(1)
