"""Coupling, autoregressive and continuous-time layers in one flow, for vectors and for images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain import nets
from flowtrain.bijections import (
    ActNorm,
    Alternate,
    Autoregressive,
    Coupling,
    ExpAffine,
    Flatten,
    LULinear,
    MultiScale,
    RationalQuadratic,
    Reverse,
    SigmoidAffine,
    Squeeze,
)
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.glow import split_prior
from flowtrain.flows.parts import Factory, chain, count_scales, permuted_lu, training_solver


def hybrid(
    shape: Sequence[int],
    *,
    pairs: int = 1,
    steps: int = 2,
    blocks: int = 1,
    hidden: int = 64,
    depth: int = 2,
    univariate: Factory = RationalQuadratic,
    mixing: Factory | None = permuted_lu,
    norm: Factory | None = ActNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Couplings and autoregressive layers of splines, then continuous-time layers, on whitened data.

    Durkan et al. 2019; Papamakarios et al. 2017; Grathwohl et al. 2019.

    Args:
        shape: of one example; it is flattened to D dimensions.
        pairs: of couplings: the first transforms the even dimensions, the second the odd ones.
        steps: autoregressive layers, each in the reversed order of the one before.
        blocks: differential equations.
        hidden, depth: units of a hidden layer of each network, and hidden layers.
        univariate: factory of the map of couplings and autoregressive layers.
        mixing, norm: factories of the layer before each pair of couplings, and of the layer before each autoregressive
            and continuous-time layer (None: no such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> hybrid((2,), hidden=8).sample(5).shape
    torch.Size([5, 2])
    """
    coupling = partial(Coupling, univariate=univariate, net=partial(nets.MLP, hidden=hidden, depth=depth))
    even = partial(coupling, partition=partial(Alternate, first=0))
    odd = partial(coupling, partition=partial(Alternate, first=1))
    autoregressive = partial(Autoregressive, univariate=univariate, net=partial(nets.MADE, hidden=hidden, depth=depth))
    ode = partial(training_solver, net=partial(nets.ODENet, hidden=hidden, depth=depth))
    layers = chain(
        preprocess=preprocess,
        flatten=Flatten,
        norm=norm,
        whiten=partial(LULinear, start="whitening"),
        couplings=chain(repeat=pairs, mixing=mixing, even=even, odd=odd),
        maf=chain(repeat=steps, norm=norm, autoregressive=autoregressive, mixing=Reverse),
        equations=chain(repeat=blocks, norm=norm, ode=ode),
    )
    return Flow(shape, layers, base, context_shape, embedding)


def hybrid_image(
    shape: Sequence[int],
    *,
    levels: int | None = None,
    steps: int = 4,
    hidden: int = 64,
    dropout: float = 0.1,
    univariate: Factory = SigmoidAffine,
    mixing: Factory | None = LULinear,
    norm: Factory | None = ActNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Glow, whose last and smallest scale goes on with a short continuous-time layer and an autoregressive one.

    Kingma and Dhariwal 2018; Grathwohl et al. 2019; Papamakarios et al. 2017.

    Args:
        shape: (channels, height, width).
        levels: scales; None: as often as the sides can be halved.
        steps: steps of flow at each scale.
        hidden: channels or units of a hidden layer of each network.
        dropout: in the couplings' conditioners.
        univariate, mixing, norm: factories of the couplings' map and of the two layers before each coupling (None: no
            such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> hybrid_image((3, 8, 8), levels=2, steps=1, hidden=8).sample(5).shape
    torch.Size([5, 3, 8, 8])
    """
    net = partial(nets.ConvNet, hidden=hidden, dropout=dropout, norm=nets.ActNorm)
    step = chain(repeat=steps, norm=norm, mixing=mixing, coupling=partial(Coupling, univariate=univariate, net=net))
    level = chain(squeeze=Squeeze, steps=step)
    dynamics = partial(nets.ConvODENet, hidden=hidden, depth=1)
    last = chain(
        level=level,
        ode=partial(training_solver, net=dynamics, time=0.5),
        flatten=Flatten,
        autoregressive=partial(Autoregressive, univariate=ExpAffine, net=partial(nets.MADE, hidden=hidden)),
    )
    scales = partial(
        MultiScale,
        levels=count_scales(shape, levels),
        level=level,
        last=last,
        split_prior=split_prior,
    )
    return Flow(shape, chain(preprocess=preprocess, scales=scales), base, context_shape, embedding)
