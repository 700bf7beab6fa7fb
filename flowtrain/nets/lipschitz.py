"""Networks of Lipschitz constant below 1, for residual flows: each layer's weights are divided by their spectral norm,
where that is too large (Behrmann et al. 2019, section 4.1; Gouk et al. 2018).

The norm is found by power iteration, whose vectors are buffers: to a tolerance at the start of training, then by a few
iterations from the last vectors after each change of the weights, without a read of the host. In evaluation it is found
to a tolerance, so that the network contracts whatever vectors a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowtrain.nets.conv import channels_of
from flowtrain.nets.initial import on_default_device, small_init
from flowtrain.nets.mlp import check_at_least_one, context_layer
from flowtrain.runtime import kept, modes

STEPS = 5  # of the power iteration after each change of the weights in training
TOLERANCE = 1e-6  # relative change of a norm over ten iterations, at which it is found
LONGEST = 1000  # tens of iterations


class SpectralNorm(nn.Module):
    """A linear map whose weights W are used as W/max(1, σ/coeff), where σ is their spectral norm.

    A subclass creates its ``weight`` and ``bias``, says how a weight maps a vector and how its adjoint does, and then
    calls :meth:`begin`.

    Args:
        coeff: the greatest norm that the map may have, in (0, 1).

    Raises:
        ValueError: ``coeff`` outside (0, 1).
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    seen: Tensor

    def __init__(self, coeff: float):
        super().__init__()
        if not 0 < coeff < 1:
            raise ValueError(f"coeff={coeff} must be above 0 and below 1")
        self.coeff = coeff
        self._is_found = False  # the vectors are not random ones

    def map(self, vector: Tensor, weight: Tensor) -> Tensor:
        """What ``weight`` maps a vector to, without the bias."""
        raise NotImplementedError

    def adjoint(self, vector: Tensor, weight: Tensor) -> Tensor:
        """What its transpose maps a vector to."""
        raise NotImplementedError

    def begin(self, shape: Sequence[int], mapped: Sequence[int]) -> None:
        """Create the vectors, one at random; the map takes one of ``shape`` to one of the shape ``mapped``."""
        right = torch.randn(shape, device="cpu")
        self.register_buffer("right", on_default_device(right / right.norm()))
        self.register_buffer("left", torch.zeros(tuple(mapped)))
        self.register_buffer("seen", torch.zeros(self.weight.shape), persistent=False)  # the weights of the vectors

    def bounded(self) -> Tensor:
        """The weights as they are used."""
        if not self.training:
            return kept.from_weights(self._bounded, "bounded", self)
        return self._bounded()

    def _bounded(self) -> Tensor:
        left, right = self.vectors()
        norm = (left * self.map(right, self.weight)).sum()  # differentiable: the vectors are constants
        return self.weight / (norm / self.coeff).clamp(min=1.0)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Left and right vectors u and v of the largest singular value uᵀWv."""
        if not self.training:
            return self.find()
        if not modes.current().repeating:
            with torch.no_grad():
                if self._is_found:
                    # an optimizer need not count the versions of what it changes, so that the weights are compared
                    changed = (self.seen != self.weight).any()
                    new = self._iterate(self.left, self.right, STEPS)
                    left, right = (torch.where(changed, *pair) for pair in zip(new, (self.left, self.right)))
                else:
                    left, right = self.find()
                for buffer, value in ((self.left, left), (self.right, right), (self.seen, self.weight)):
                    buffer.copy_(value)
            self._is_found = True
        return self.left.clone(), self.right.clone()  # which the next change of the buffers leaves alone

    @torch.no_grad()
    def find(self) -> tuple[Tensor, Tensor]:
        """The vectors, to a tolerance."""
        check_finite(self.weight)
        left, right, norm = self.left, self.right, -1.0
        for _ in range(LONGEST):
            left, right = self._iterate(left, right, 10)
            before, norm = norm, (left * self.map(right, self.weight)).sum().item()
            if abs(norm - before) <= TOLERANCE * norm:
                break
        return left, right

    @torch.no_grad()
    def _iterate(self, left: Tensor, right: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        for _ in range(steps):
            right = _normalized(self.adjoint(self.map(right, self.weight), self.weight), right)
        return _normalized(self.map(right, self.weight), left), right

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        own = {prefix + "left": self.left, prefix + "right": self.right}
        fits = all(name in state_dict and state_dict[name].shape == one.shape for name, one in own.items())
        if not fits and prefix + "right" in state_dict:  # vectors of another size of image say nothing here
            state_dict.update(own)
        self._is_found = fits
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self):
        return f"{list(self.weight.shape)}, coeff={self.coeff}"


def check_finite(weight: Tensor) -> None:
    """FloatingPointError where a weight is NaN or infinite: it has no norm."""
    if not weight.isfinite().all():
        raise FloatingPointError("a network of a residual flow has weights that are not finite")


def _normalized(vector: Tensor, other: Tensor) -> Tensor:
    """``vector`` at length 1; the ``other`` where it is 0."""
    length = vector.norm()
    return torch.where(length > 0, vector / length, other)


class LipschitzLinear(SpectralNorm):
    """A linear layer, (B, n) -> (B, out), of Lipschitz constant at most ``coeff``. In evaluation its norm is found by a
    singular value decomposition.

    Raises:
        ValueError: ``coeff`` outside (0, 1).

    >>> layer = LipschitzLinear(3, 4, coeff=0.5).eval()
    >>> bool(torch.linalg.matrix_norm(layer.bounded(), 2) <= 0.5 + 1e-6)
    True
    """

    def __init__(self, n: int, out: int, coeff: float = 0.98):
        super().__init__(coeff)
        linear = nn.Linear(n, out)
        self.weight, self.bias = linear.weight, linear.bias
        self.begin((n,), (out,))

    def map(self, vector, weight):
        return weight @ vector

    def adjoint(self, vector, weight):
        return weight.T @ vector

    @torch.no_grad()
    def find(self):
        check_finite(self.weight)
        left, _, right = torch.linalg.svd(self.weight, full_matrices=False)
        return left[:, 0].contiguous(), right[0].contiguous()

    def forward(self, x):
        return F.linear(x, self.bounded(), self.bias)


class LipschitzConv(SpectralNorm):
    """A convolution that keeps the size of an image, (B, C, H, W) -> (B, out, H, W), of Lipschitz constant at most
    ``coeff``: its norm is that of the map of images of this size, zeros around them, by power iteration with the
    convolution and its transpose.

    Args:
        shape: (C, H, W).
        out: channels of the output.
        kernel: side of the filters, odd.
        coeff: as of :class:`SpectralNorm`.

    Raises:
        ValueError: ``shape`` is not an image's, or ``coeff`` is outside (0, 1).

    >>> LipschitzConv((3, 8, 8), 4)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(self, shape, out: int, kernel: int = 3, coeff: float = 0.98):
        super().__init__(coeff)
        self.padding = kernel // 2
        conv = nn.Conv2d(channels_of(shape), out, kernel, padding=self.padding)
        self.weight, self.bias = conv.weight, conv.bias
        pixels = [n + 2 * self.padding + 1 - kernel for n in shape[1:]]
        sizes = (shape[1:], pixels) if kernel > 1 else ((1, 1), (1, 1))  # all pixels have the norm of one
        self.begin((1, shape[0], *sizes[0]), (1, out, *sizes[1]))

    def map(self, vector, weight):
        return F.conv2d(vector, weight, padding=self.padding)

    def adjoint(self, vector, weight):
        return F.conv_transpose2d(vector, weight, padding=self.padding)

    def forward(self, x):
        return F.conv2d(x, self.bounded(), self.bias, padding=self.padding)


class LipSwish(nn.Module):
    """x·σ(βx)/1.1 with β = softplus(b) of a learned b (Chen et al. 2019, section 3.3). Its Lipschitz constant is below
    1 for every β, and its second derivative does not vanish where the first is large, as that of a rectifier does.

    >>> LipSwish()(torch.zeros(2))
    tensor([0., 0.], grad_fn=<DivBackward0>)
    """

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * torch.sigmoid(F.softplus(self.b) * x) / 1.1


class _LipschitzNet(nn.Module):
    """Layers with :class:`LipSwish` between them. A linear map of the context vector, if there is one, is added after
    the first layer: it is free, since the constant is that in x.

    Attributes:
        lipschitz: a bound of the Lipschitz constant in x.
    """

    def __init__(self, layers: Sequence[SpectralNorm], hidden: int, context_shape):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(LipSwish() for _ in layers[1:])
        self.context = context_layer(hidden, context_shape)
        self.lipschitz = layers[0].coeff ** len(layers)

    def forward(self, x, context=None):
        first, *others = self.layers
        h = first(x)
        if self.context is not None:
            h = h + self.context(context).view(*h.shape[:2], *[1] * (h.dim() - 2))
        for activation, layer in zip(self.activations, others):
            h = layer(activation(h))
        return h


class LipschitzMLP(_LipschitzNet):
    """(B, D) -> (B, D), of Lipschitz constant at most coeff^(depth + 1): ``depth`` hidden layers of ``hidden`` units,
    with :class:`LipSwish`. Its last layer is nearly 0 at the start.

    Args:
        shape: (D,).
        hidden, depth: units of a hidden layer, and hidden layers.
        coeff: the greatest norm of each layer, in (0, 1).
        context_shape: (C,), or None. A linear map of the context is added to the first hidden layer.

    Raises:
        ValueError: ``shape`` is not a vector's, a size is below 1, or ``coeff`` is outside (0, 1).

    >>> LipschitzMLP((3,), hidden=16)(torch.randn(5, 3)).shape
    torch.Size([5, 3])
    """

    def __init__(self, shape, hidden: int = 64, depth: int = 2, coeff: float = 0.98, context_shape=None):
        if len(shape) != 1:
            raise ValueError(f"a LipschitzMLP takes vectors, not {list(shape)}; flatten first")
        check_at_least_one(hidden=hidden, depth=depth)
        widths = [shape[0], *[hidden] * depth, shape[0]]
        layers = [LipschitzLinear(n, out, coeff) for n, out in pairwise(widths)]
        super().__init__([*layers[:-1], small_init(layers[-1])], hidden, context_shape)


class LipschitzConvNet(_LipschitzNet):
    """(B, C, H, W) -> (B, C, H, W), of Lipschitz constant at most coeff³: a 3×3, a 1×1 and a 3×3 convolution (Chen et
    al. 2019, appendix E), with :class:`LipSwish` between. The last one is nearly 0 at the start.

    Args:
        shape: (C, H, W).
        hidden: channels between.
        coeff: the greatest norm of each layer, in (0, 1).
        context_shape: (C,), or None. A linear map of the context is added after the first convolution.

    Raises:
        ValueError: ``shape`` is not an image's, ``hidden`` is below 1, or ``coeff`` is outside (0, 1).

    >>> LipschitzConvNet((3, 8, 8), hidden=16)(torch.randn(5, 3, 8, 8)).shape
    torch.Size([5, 3, 8, 8])
    """

    def __init__(self, shape, hidden: int = 64, coeff: float = 0.98, context_shape=None):
        channels, sides = channels_of(shape), shape[1:]
        check_at_least_one(hidden=hidden)
        layers = [
            LipschitzConv((channels, *sides), hidden, 3, coeff),
            LipschitzConv((hidden, *sides), hidden, 1, coeff),
            small_init(LipschitzConv((hidden, *sides), channels, 3, coeff)),
        ]
        super().__init__(layers, hidden, context_shape)
