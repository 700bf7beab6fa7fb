"""Neural spline flows (Durkan et al. 2019): coupling and autoregressive, and coupling for images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain import nets
from flowtrain.bijections import (
    ActNorm,
    Alternate,
    Autoregressive,
    Coupling,
    Elementwise,
    Flatten,
    Halves,
    MultiScale,
    RationalQuadratic,
    Squeeze,
)
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, count_scales, permuted_lu, permuted_lu_actnorm


def nsf_coupling(
    shape: Sequence[int],
    *,
    pairs: int = 2,
    hidden: int = 64,
    blocks: int = 2,
    dropout: float = 0.0,
    unconditional: bool = True,
    univariate: Factory = RationalQuadratic,
    mixing: Factory | None = permuted_lu_actnorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """RQ-NSF(C): couplings of splines on alternating dimensions, a linear layer before each and at the end.

    Args:
        shape: of one example; it is flattened to D dimensions.
        pairs: of couplings: the first transforms the even dimensions, the second the odd ones.
        hidden, blocks: units of a hidden layer of a conditioner, and residual blocks.
        dropout: in the conditioners.
        unconditional: the conditioning half has a spline of its own (Durkan et al. 2019, appendix B.1).
        univariate, mixing: factories of the couplings' map and of the linear layer (None: no such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> nsf_coupling((3,), hidden=16).sample(5).shape
    torch.Size([5, 3])
    """
    coupling = partial(
        Coupling,
        univariate=univariate,
        net=partial(nets.ResidualMLP, hidden=hidden, blocks=blocks, dropout=dropout),
        unconditional=partial(Elementwise, univariate=univariate) if unconditional else None,
    )
    even = partial(coupling, partition=partial(Alternate, first=0))
    odd = partial(coupling, partition=partial(Alternate, first=1))
    pair = chain(repeat=pairs, mixing_even=mixing, even=even, mixing_odd=mixing, odd=odd)
    layers = chain(preprocess=preprocess, flatten=Flatten, couplings=pair, mixing=mixing)
    return Flow(shape, layers, base, context_shape, embedding)


def nsf_autoregressive(
    shape: Sequence[int],
    *,
    steps: int = 3,
    hidden: int = 64,
    blocks: int = 2,
    dropout: float = 0.0,
    univariate: Factory = RationalQuadratic,
    mixing: Factory | None = permuted_lu_actnorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """RQ-NSF(AR): masked autoregressive layers of splines, a linear layer before each and at the end.

    Args:
        shape: of one example; it is flattened to D dimensions.
        steps: autoregressive layers.
        hidden, blocks: units of a hidden layer of a conditioner, and residual blocks.
        dropout: in the conditioners.
        univariate, mixing: factories of the layers' map and of the linear layer (None: no such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> import torch
    >>> flow = nsf_autoregressive((3,), hidden=16, context_shape=(2,))
    >>> flow.log_prob(torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([5])
    """
    net = partial(nets.ResidualMADE, hidden=hidden, blocks=blocks, dropout=dropout)
    layer = partial(Autoregressive, univariate=univariate, net=net)
    step = chain(repeat=steps, mixing=mixing, autoregressive=layer)
    return Flow(
        shape, chain(preprocess=preprocess, flatten=Flatten, steps=step, mixing=mixing), base, context_shape, embedding
    )


def nsf_image(
    shape: Sequence[int],
    *,
    levels: int | None = None,
    steps: int = 4,
    hidden: int = 32,
    blocks: int = 1,
    dropout: float = 0.1,
    net_norm: bool = True,
    univariate: Factory = RationalQuadratic,
    mixing: Factory | None = permuted_lu,
    norm: Factory | None = ActNorm,
    scales: Factory = MultiScale,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """RQ-NSF(C) for images: Glow's steps with splines, and one more linear layer at the end of each scale.

    What is factored out has no learned prior (Durkan et al. 2019, section 5.2 and reference code).

    Args:
        shape: (channels, height, width).
        levels: scales; None: as often as the sides can be halved.
        steps: steps of flow at each scale.
        hidden, blocks: channels of a conditioner, and residual blocks.
        dropout: in the conditioners.
        net_norm: batch normalization in the conditioners.
        univariate, mixing, norm: factories of the couplings' map and of the two layers before each coupling (None: no
            such layer).
        scales: ``MultiScale`` factors half of the channels out after each scale,
            :func:`flowtrain.flows.parts.single_scale` keeps all of them.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> nsf_image((3, 8, 8), levels=2, steps=1, hidden=8).sample(5).shape
    torch.Size([5, 3, 8, 8])
    """
    net = partial(
        nets.PreactivatedConvNet,
        hidden=hidden,
        blocks=blocks,
        dropout=dropout,
        norm=partial(nets.BatchNorm, eps=1e-3) if net_norm else None,
    )
    coupling = partial(Coupling, univariate=univariate, net=net, partition=partial(Halves, swap=True))
    step = chain(repeat=steps, norm=norm, mixing=mixing, coupling=coupling)
    level = chain(squeeze=Squeeze, steps=step, mixing=mixing)
    layers = chain(preprocess=preprocess, scales=partial(scales, levels=count_scales(shape, levels), level=level))
    return Flow(shape, layers, base, context_shape, embedding)
