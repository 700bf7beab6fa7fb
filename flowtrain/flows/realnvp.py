"""Real NVP (Dinh et al. 2017), for images and for vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain import nets
from flowtrain.bijections import (
    Alternate,
    BatchNorm,
    Checkerboard,
    Coupling,
    DiagonalFirst,
    Flatten,
    Halves,
    MultiScale,
    Squeeze,
    TanhAffine,
)
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, check_image, count_scales


def realnvp(
    shape: Sequence[int],
    *,
    levels: int | None = None,
    hidden: int = 16,
    blocks: int = 1,
    dropout: float = 0.0,
    net_norm: bool = True,
    univariate: Factory = TanhAffine,
    norm: Factory | None = BatchNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Checkerboard and channel couplings at several scales (Dinh et al. 2017, figures 2 and 3, section 3.6).

    At each scale: three checkerboard couplings, a squeeze and three channel couplings, then half of the variables are
    factored out; the last scale has four checkerboard couplings.

    Args:
        shape: (channels, height, width).
        levels: scales; None: as often as the sides can be halved.
        hidden: channels of a conditioner at full resolution, doubled where the sides halve.
        blocks: residual blocks of a conditioner.
        dropout: in the conditioners.
        net_norm: batch normalization in the conditioners.
        univariate, norm: factories of the couplings' map and of the layer after each coupling (None: no such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> import torch
    >>> flow = realnvp((3, 8, 8), levels=2, hidden=4)
    >>> flow.log_prob(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5])
    """
    check_image(shape)
    net = partial(
        nets.ResidualConvNet,
        hidden=hidden,
        full_side=shape[-1],
        blocks=blocks,
        dropout=dropout,
        norm=nets.BatchNorm if net_norm else None,
    )
    coupling = partial(Coupling, univariate=univariate, net=net)
    odd = partial(coupling, partition=partial(Checkerboard, colour=0))  # the top-left pixel conditions
    even = partial(coupling, partition=partial(Checkerboard, colour=1))
    second = partial(coupling, partition=Halves)
    first = partial(coupling, partition=partial(Halves, swap=True))
    checkerboards = partial(
        chain, checkerboard0=odd, norm0=norm, checkerboard1=even, norm1=norm, checkerboard2=odd, norm2=norm
    )
    level = checkerboards(
        squeeze=Squeeze,
        channel0=second,
        norm3=norm,
        channel1=first,
        norm4=norm,
        channel2=second,
        norm5=norm,
        keep=DiagonalFirst,
    )
    last = checkerboards(checkerboard3=even, norm3=norm)
    layers = chain(
        preprocess=preprocess,
        scales=partial(MultiScale, levels=count_scales(shape, levels, halves_last=False), level=level, last=last),
    )
    return Flow(shape, layers, base, context_shape, embedding)


def realnvp_vector(
    shape: Sequence[int],
    *,
    pairs: int = 3,
    hidden: int = 128,
    depth: int = 2,
    dropout: float = 0.0,
    univariate: Factory = TanhAffine,
    norm: Factory | None = BatchNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Couplings on alternating dimensions, a norm after each: the baseline of Papamakarios et al. 2017, section 4.

    One network gives shift and log-scale, where that baseline has one network for each.

    Args:
        shape: of one example; it is flattened to D dimensions.
        pairs: of couplings: the first transforms the even dimensions, the second the odd ones.
        hidden, depth: units of a hidden layer of a conditioner, and hidden layers.
        dropout: in the conditioners.
        univariate, norm: factories of the couplings' map and of the layer after each coupling (None: no such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> import torch
    >>> realnvp_vector((2,), hidden=16).log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """
    net = partial(nets.MLP, hidden=hidden, depth=depth, dropout=dropout)
    even = partial(Coupling, univariate=univariate, net=net, partition=partial(Alternate, first=0))
    odd = partial(Coupling, univariate=univariate, net=net, partition=partial(Alternate, first=1))
    pair = chain(repeat=pairs, even=even, norm_even=norm, odd=odd, norm_odd=norm)
    return Flow(shape, chain(preprocess=preprocess, flatten=Flatten, couplings=pair), base, context_shape, embedding)
