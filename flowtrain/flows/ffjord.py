"""FFJORD (Grathwohl et al. 2019): continuous-time flows of vectors and of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import ActNorm, Flatten, LULinear, MultiScale, Squeeze
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, count_scales, training_solver
from flowtrain.nets import ConvODENet, ODENet


def ffjord(
    shape: Sequence[int],
    *,
    blocks: int = 1,
    hidden: int = 64,
    depth: int = 3,
    layer: str = "concatsquash",
    activation: str = "tanh",
    whiten: bool = True,
    ode: Factory = training_solver,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Ordinary differential equations as layers (Grathwohl et al. 2019, section 3).

    Args:
        shape: of one example; it is flattened to D dimensions.
        blocks: equations, one after another.
        hidden, depth: units of a hidden layer of the dynamics, and hidden layers.
        layer: how time enters each layer: concatsquash or concat.
        activation: tanh or softplus.
        whiten: the first batch starts two layers before the first equation, which give the data mean 0, variance 1 and
            no correlations: correlated data make the equation steep.
        ode: factory of the layer, with its solver; see :class:`flowtrain.bijections.Continuous`.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> ffjord((2,), hidden=16, depth=1).sample(5).shape
    torch.Size([5, 2])
    """
    net = partial(ODENet, hidden=hidden, depth=depth, layer=layer, activation=activation)
    layers = chain(
        preprocess=preprocess,
        flatten=Flatten,
        norm=ActNorm if whiten else None,
        mixing=partial(LULinear, start="whitening") if whiten else None,
        blocks=chain(repeat=blocks, ode=partial(ode, net=net)),
    )
    return Flow(shape, layers, base, context_shape, embedding)


def ffjord_image(
    shape: Sequence[int],
    *,
    levels: int | None = None,
    blocks: int = 1,
    hidden: int = 24,
    depth: int = 2,
    layer: str = "concat",
    activation: str = "softplus",
    actnorm: bool = True,
    ode: Factory = training_solver,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Convolutional equations at several scales (Grathwohl et al. 2019, section 4.2 and reference code).

    Each scale has equations, a squeeze and more equations; then half of the channels are factored out. The last scale
    has no squeeze.

    Args:
        shape: (channels, height, width).
        levels: scales; None: as often as the sides can be halved.
        blocks: equations, one after another, before and after each squeeze.
        hidden, depth: channels of a hidden layer of the dynamics, and hidden layers.
        layer: how time enters each layer: concat or concatsquash.
        activation: softplus or tanh.
        actnorm: of the data, before the first equation.
        ode: factory of the layer, with its solver; see :class:`flowtrain.bijections.Continuous`.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> ffjord_image((1, 4, 4), levels=1, hidden=4, depth=1).sample(5).shape
    torch.Size([5, 1, 4, 4])
    """
    net = partial(ConvODENet, hidden=hidden, depth=depth, layer=layer, activation=activation)
    block = chain(repeat=blocks, ode=partial(ode, net=net))
    scales = partial(
        MultiScale,
        levels=count_scales(shape, levels, halves_last=False),
        level=chain(before=block, squeeze=Squeeze, after=block),
        last=block,
    )
    layers = chain(preprocess=preprocess, norm=ActNorm if actnorm else None, scales=scales)
    return Flow(shape, layers, base, context_shape, embedding)
