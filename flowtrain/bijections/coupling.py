"""Coupling layers, and the partitions of an event that they work on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowtrain.bijections.bijection import Bijection, full_precision, size, sum_event
from flowtrain.bijections.elementwise import Elementwise
from flowtrain.bijections.univariate import Univariate, per_element
from flowtrain.runtime import fusion


class Partition(nn.Module):
    """Splits an event into a conditioning part and a transformed part.

    A vector of one number is transformed, and its conditioning part is empty.

    Attributes:
        conditioning_shape, transformed_shape: of the parts.
        seen: the channels of the conditioning part, where it is a slice of them.
    """

    conditioning_shape: tuple[int, ...]
    transformed_shape: tuple[int, ...]
    seen: slice

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, *shape) -> conditioning part (B, *conditioning_shape), transformed part (B, *transformed_shape)."""
        raise NotImplementedError

    def conditioning(self, x: Tensor) -> Tensor:
        """The first part alone."""
        return self.split(x)[0]

    def merge(self, conditioning: Tensor, transformed: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        raise NotImplementedError

    def log_det(self, log_derivative: Tensor) -> Tensor:
        """The log-determinant (B,) from the log-derivatives of the transformed part."""
        return sum_event(log_derivative)


class Halves(Partition):
    """Halves of the channels: the first conditions, the second is transformed; ``swap`` exchanges them.

    Raises:
        ValueError: an image of one channel.

    >>> [part.shape for part in Halves((4, 8, 8)).split(torch.randn(5, 4, 8, 8))]
    [torch.Size([5, 2, 8, 8]), torch.Size([5, 2, 8, 8])]
    """

    def __init__(self, shape, swap: bool = False):
        super().__init__()
        channels, *rest = shape
        if channels < 2 and rest:
            raise ValueError(f"a shape of {list(shape)} has no two halves of channels; squeeze it first")
        self.swap, self.first = swap and channels > 1, channels // 2
        first, second = (self.first, *rest), (channels - self.first, *rest)
        self.conditioning_shape, self.transformed_shape = (second, first) if self.swap else (first, second)
        self.seen = slice(self.first, channels) if self.swap else slice(0, self.first)

    def split(self, x):
        first, second = x.split([self.first, x.shape[1] - self.first], 1)
        return (second, first) if self.swap else (first, second)

    def merge(self, conditioning, transformed):
        return torch.cat((transformed, conditioning) if self.swap else (conditioning, transformed), 1)


class Alternate(Partition):
    """Every second channel, or dimension of a vector, is transformed, from number ``first`` on: NICE's partition (Dinh
    et al. 2015, section 5.1).

    Raises:
        ValueError: an image of one channel, or ``first`` not 0 or 1.

    >>> Alternate((4,)).split(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    (tensor([[1., 3.]]), tensor([[0., 2.]]))
    """

    def __init__(self, shape, first: int = 0):
        super().__init__()
        channels, *rest = shape
        if channels < 2 and rest:
            raise ValueError(f"a shape of {list(shape)} has no second channel; squeeze it first")
        if first not in (0, 1):
            raise ValueError(f"first={first} must be 0 or 1")
        self.first = first if channels > 1 else 0
        transformed = len(range(self.first, channels, 2))
        self.conditioning_shape, self.transformed_shape = (channels - transformed, *rest), (transformed, *rest)
        self.seen = slice(1 - self.first, channels, 2)

    def split(self, x):
        if self._is_paired(x):
            pair = x.reshape(x.shape[0], x.shape[1] // 2, 2).unbind(2)  # its gradient: one operation, not seven
            return pair[1 - self.first], pair[self.first]
        return self.conditioning(x), x[:, self.first :: 2]

    def conditioning(self, x):
        return x[:, self.seen]

    def merge(self, conditioning, transformed):
        if self._is_paired(conditioning):
            pair = (conditioning, transformed) if self.first else (transformed, conditioning)
            return torch.stack(pair, 2).flatten(1)
        out = transformed.new_empty(
            transformed.shape[0], conditioning.shape[1] + transformed.shape[1], *transformed.shape[2:]
        )
        out[:, 1 - self.first :: 2], out[:, self.first :: 2] = conditioning, transformed
        return out

    def _is_paired(self, x):
        """Whether x is a vector of pairs: an element of each goes to either part."""
        return x.dim() == 2 and self.conditioning_shape == self.transformed_shape


class Checkerboard(Partition):
    """One colour of a checkerboard of pixels conditions, the other is transformed (Dinh et al. 2017, section 3.4).

    The conditioning part is the whole image with the transformed pixels set to 0. ``colour`` 0 transforms the pixels
    whose row and column sum to an odd number, so that the top-left pixel conditions, as in the reference code.

    Raises:
        ValueError: not an image, or ``colour`` not 0 or 1.

    >>> Checkerboard((1, 2, 2)).split(torch.ones(1, 1, 2, 2))[0]
    tensor([[[[1., 0.],
              [0., 1.]]]])
    """

    transforms: Tensor

    def __init__(self, shape, colour: int = 0):
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"a checkerboard needs images (channels, height, width), not {list(shape)}")
        if colour not in (0, 1):
            raise ValueError(f"colour={colour} must be 0 or 1")
        _, height, width = shape
        transforms = [[(row + column + colour) % 2 == 1 for column in range(width)] for row in range(height)]
        self.register_buffer("transforms", torch.tensor(transforms), persistent=False)
        self.conditioning_shape = self.transformed_shape = tuple(shape)

    def split(self, x):
        return x.masked_fill(self.transforms, 0), x

    def merge(self, conditioning, transformed):
        return torch.where(self.transforms, transformed, conditioning)

    def log_det(self, log_derivative):
        return sum_event(log_derivative.masked_fill(~self.transforms, 0))


class PackedCheckerboard(Partition):
    """The colours of a :class:`Checkerboard`, each packed into an image of half the width, so that a conditioner reads
    and computes half as many pixels. Pixel (row, i) of a part is that of its colour in columns 2i and 2i + 1.

    Raises:
        ValueError: not an image, an odd width, or ``colour`` not 0 or 1.

    >>> image = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    >>> PackedCheckerboard((1, 2, 4)).split(image[None, None])[0]
    tensor([[[[0., 2.],
              [5., 7.]]]])
    """

    odd: Tensor

    def __init__(self, shape, colour: int = 0):
        super().__init__()
        if len(shape) != 3 or shape[2] % 2:
            raise ValueError(f"a packed checkerboard needs images (channels, height, even width), not {list(shape)}")
        if colour not in (0, 1):
            raise ValueError(f"colour={colour} must be 0 or 1")
        channels, height, width = shape
        odd = [[(row + colour) % 2 == 1] for row in range(height)]
        self.register_buffer("odd", torch.tensor(odd), persistent=False)  # where the second pixel conditions
        self.conditioning_shape = self.transformed_shape = (channels, height, width // 2)

    def split(self, x):
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.where(self.odd, second, first), torch.where(self.odd, first, second)

    def merge(self, conditioning, transformed):
        first = torch.where(self.odd, transformed, conditioning)
        second = torch.where(self.odd, conditioning, transformed)
        return torch.stack((first, second), -1).flatten(-2)


class Coupling(Bijection):
    """z = (a, τ(b; net(a))) for x split into a conditioning part a and a transformed part b (Dinh et al. 2015, section
    3.2; Dinh et al. 2017, eq. 4 and 5).

    Where a is empty, as for a vector of one number, the parameters of τ are learned, or net(context) if there is a
    context: the layer is an :class:`Elementwise`, or a :class:`Conditional`.

    Args:
        shape: of one event.
        univariate: factory of τ, called with the transformed part's shape.
        net: factory ``net(shape=…, out=…, context_shape=…)`` of the conditioner: (B, *conditioning_shape) to
            (B, out, …).
        partition: factory of the split, called with ``shape``.
        unconditional: factory of a bijection that maps a too, after the conditioner has read it (Durkan et al. 2019,
            appendix B.1); None leaves a as it is.
        context_shape: of a context that the conditioner reads too, or None.

    Raises:
        ValueError: an ``unconditional`` where the parts overlap, as on a checkerboard, or what a factory refuses.

    >>> from flowtrain import bijections as b, nets
    >>> b.Coupling((4,), b.RationalQuadratic, nets.MLP)(torch.randn(5, 4))[0].shape
    torch.Size([5, 4])
    """

    reversible = True  # if ``unconditional`` is
    places: Tensor | None  # of the numbers of a vector, where one call of τ may map both parts; on the CPU
    mapped: Tensor | None  # of the transformed part of a vector, where the other part stays; on the CPU

    def __init__(
        self,
        shape,
        univariate: Callable[..., Univariate],
        net: Callable[..., nn.Module],
        partition: Callable[..., Partition] = Halves,
        unconditional: Callable[..., Bijection] | None = None,
        context_shape=None,
    ):
        super().__init__(shape, context_shape)
        self.partition = partition(shape=self.shape)
        transformed = self.partition.transformed_shape
        self.univariate = univariate(shape=transformed)
        conditioning, out = self.partition.conditioning_shape, transformed[0] * self.univariate.params
        if size(conditioning):
            self.net = net(shape=conditioning, out=out, context_shape=context_shape)
        else:
            self.net = _Learned(out) if context_shape is None else _OfContext(net(shape=self.context_shape, out=out))
            unconditional = None
        if unconditional is not None and size(conditioning) + size(transformed) > size(self.shape):
            raise ValueError(
                f"unconditional: {type(self.partition).__name__} conditions on the whole event: no part is left"
            )
        self.unconditional = unconditional and unconditional(shape=conditioning, context_shape=context_shape)
        self.reversible = type(self).reversible and (self.unconditional is None or self.unconditional.reversible)
        self.places = self.mapped = None
        if self.unconditional is None and len(self.shape) == 1 and type(self.partition) in (Halves, Alternate):
            self.mapped = self.partition.split(torch.arange(self.shape[0], device="cpu")[None])[1][0].contiguous()
        other = self.unconditional if type(self.unconditional) is Elementwise and len(self.shape) == 1 else None
        if other and self.univariate.joins(other.univariate):
            numbers = [torch.arange(n, device="cpu")[None] for n in (*conditioning, *transformed)]
            self.places = self.partition.merge(-1 - numbers[0], numbers[1])[0]

    def forward(self, x, context=None):
        if self.places is None:
            conditioning, transformed = self.partition.split(x)
            theta = self._theta(conditioning, context)
            if whole := self._map_part(x, theta, False):
                return whole
        else:
            if context is None and (whole := self._with_network(x)):
                return whole
            theta = self._theta(self.partition.conditioning(x), context)
            if joined := self._map_both(x, theta):
                return joined
            conditioning, transformed = self.partition.split(x)
        transformed, log_det = self._map(self.univariate, transformed, theta)
        if self.unconditional is not None:
            conditioning, unconditional_log_det = self.unconditional(conditioning, context)
            log_det = log_det + unconditional_log_det
        return self.partition.merge(conditioning, transformed), log_det

    def inverse(self, z, context=None):
        conditioning, transformed = self.partition.split(z)
        unconditional_log_det = 0
        if self.unconditional is not None:
            conditioning, unconditional_log_det = self.unconditional.inverse(conditioning, context)
        theta = self._theta(conditioning, context)
        if whole := self._map_part(z, theta, True):
            return whole
        transformed, log_det = self._map(self.univariate.inverse, transformed, theta)
        return self.partition.merge(conditioning, transformed), log_det + unconditional_log_det

    def exact_inputs(self, x):
        conditioning, transformed = self.partition.split(x)
        return (conditioning,) if self.univariate.smooth else (conditioning, transformed)

    def recompute(self, z, context=None, restore=lambda part: part):
        """With one evaluation of the network."""
        with torch.no_grad():
            conditioning, transformed = self.partition.split(z)
            if self.unconditional is not None:
                conditioning, _ = self.unconditional.inverse(conditioning, context)
            leaf = self.partition.merge(restore(conditioning), torch.zeros_like(transformed))
        conditioning, unknown = self.partition.split(leaf.requires_grad_())
        theta = self._theta(conditioning, context)
        with torch.no_grad():
            transformed = restore(self._map(self.univariate.inverse, transformed, theta)[0])
            x = self.partition.merge(conditioning, transformed)
            known = self.partition.split(x)[1] - unknown  # the transformed part, computed after the network has run
        transformed, log_det = self._map(self.univariate, unknown + known, theta)
        if self.unconditional is not None:
            conditioning, unconditional_log_det = self.unconditional(conditioning, context)
            log_det = log_det + unconditional_log_det
        return x, leaf, self.partition.merge(conditioning, transformed), log_det

    def _theta(self, conditioning, context):
        return per_element(self.net(conditioning, context).to(conditioning.dtype), self.univariate.params)

    def _with_network(self, x):
        """The coupling as one function; None where its network, or a layer of it, has to be called."""
        layers = getattr(self.net, "dense_layers", None)
        if layers is None or not x.is_cpu or type(self.partition) not in (Halves, Alternate):
            return None
        may_fuse = fusion.may_fuse(self.net, self.univariate, self.unconditional)
        if not may_fuse or torch.is_autocast_enabled(x.device.type):
            return None

        def in_turn(x, h, shared):
            z, log_slope = self._in_turn(x, per_element(h, self.univariate.params), shared)
            return z, sum_event(log_slope)

        found = layers()
        return found and self.univariate.of_network(x, self._shared(), self.places, self.partition.seen, found, in_turn)

    def _map_part(self, x, theta, inverse):
        """A vector whose conditioning part stays, by one call of τ; None where it has none."""
        if self.mapped is None or not fusion.may_fuse(self.univariate):
            return None

        def by_torch(x, theta):
            conditioning, transformed = self.partition.split(x)
            transformed, log_det = self._map(
                self.univariate.inverse if inverse else self.univariate, transformed, theta
            )
            return self.partition.merge(conditioning, transformed), log_det

        return self.univariate.of_vectors(x, theta, self.mapped, inverse, by_torch)

    def _map_both(self, x, theta):
        """Both parts by one call of τ; None where it has none, or the layer of the other part has to be called."""
        if not fusion.may_fuse(self.univariate, self.unconditional):
            return None
        with full_precision(x):
            joined = self.univariate.of_parts(x, theta, self._shared(), self.places, self._in_turn)
        return joined and (joined[0], sum_event(joined[1]))

    def _in_turn(self, x, theta, shared):
        """Both parts by two calls of τ."""
        conditioning, transformed = self.partition.split(x)
        conditioning, transformed = self.univariate(conditioning, shared), self.univariate(transformed, theta)
        return [self.partition.merge(*pair) for pair in zip(conditioning, transformed)]

    def _shared(self):
        """The parameters (n, params) of the other part, which all rows share."""
        return self.unconditional.theta.expand(*self.unconditional.shape, -1)

    def _map(self, univariate, transformed, theta):
        with full_precision(transformed):
            transformed, log_derivative = univariate(transformed, theta)
            return transformed, self.partition.log_det(log_derivative)


class _Learned(nn.Module):
    """Numbers that are the same for every example, 0 at the start."""

    def __init__(self, out: int):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(out))

    def forward(self, conditioning, context):
        return self.theta.expand(conditioning.shape[0], -1)


class _OfContext(nn.Module):
    """``net(context)``."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, conditioning, context):
        return self.net(context)
