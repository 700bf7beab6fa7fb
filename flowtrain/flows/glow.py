"""Glow (Kingma and Dhariwal 2018), for images and for vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain import nets
from flowtrain.bijections import (
    ActNorm,
    Conditional,
    Coupling,
    Elementwise,
    ExpAffine,
    Flatten,
    LULinear,
    MultiScale,
    SigmoidAffine,
    Squeeze,
)
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import PER_CHANNEL, Factory, chain, count_scales

# The learned prior of the half that is factored out, given the half that stays; always affine.
split_prior = partial(Conditional, univariate=ExpAffine, net=nets.ZeroConv)


def glow(
    shape: Sequence[int],
    *,
    levels: int | None = None,
    steps: int = 6,
    hidden: int = 64,
    dropout: float = 0.1,
    net_norm: bool = True,
    learned_prior: bool = True,
    univariate: Factory = SigmoidAffine,
    mixing: Factory | None = LULinear,
    norm: Factory | None = ActNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Steps of actnorm, 1×1 convolution and coupling at several scales (Kingma and Dhariwal 2018, figure 2).

    Each scale squeezes the image and goes through ``steps`` steps; then half of the channels are factored out.

    Args:
        shape: (channels, height, width).
        levels: scales; None: as often as the sides can be halved.
        steps: steps of flow at each scale.
        hidden: channels of a conditioner.
        dropout: in the conditioners.
        net_norm: actnorm after the hidden layers of the conditioners, as in the reference code.
        learned_prior: mean and scale of what is factored out follow from what stays, those of the last latent are
            learned for each channel, as in the reference code; else all latents are standard.
        univariate, mixing, norm: factories of the couplings' map and of the two layers before each coupling (None: no
            such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> import torch
    >>> flow = glow((3, 8, 8), levels=2, steps=1, hidden=8)
    >>> flow.sample(5).shape
    torch.Size([5, 3, 8, 8])
    """
    net = partial(nets.ConvNet, hidden=hidden, dropout=dropout, norm=nets.ActNorm if net_norm else None)
    step = chain(repeat=steps, norm=norm, mixing=mixing, coupling=partial(Coupling, univariate=univariate, net=net))
    level = chain(squeeze=Squeeze, steps=step)
    top = partial(Elementwise, univariate=ExpAffine, share=PER_CHANNEL) if learned_prior else None
    scales = partial(
        MultiScale,
        levels=count_scales(shape, levels),
        level=level,
        last=chain(level=level, top=top),
        split_prior=split_prior if learned_prior else None,
    )
    return Flow(shape, chain(preprocess=preprocess, scales=scales), base, context_shape, embedding)


def glow_vector(
    shape: Sequence[int],
    *,
    steps: int = 6,
    hidden: int = 128,
    depth: int = 2,
    dropout: float = 0.0,
    univariate: Factory = SigmoidAffine,
    mixing: Factory | None = LULinear,
    norm: Factory | None = ActNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Glow's steps on a vector: actnorm, a linear layer, a coupling of its two halves.

    Args:
        shape: of one example; it is flattened to D dimensions.
        steps: steps of flow.
        hidden, depth: units of a hidden layer of a conditioner, and hidden layers.
        dropout: in the conditioners.
        univariate, mixing, norm: factories of the couplings' map and of the two layers before each coupling (None: no
            such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> glow_vector((2,), steps=2, hidden=16).sample(5).shape
    torch.Size([5, 2])
    """
    net = partial(nets.MLP, hidden=hidden, depth=depth, dropout=dropout)
    step = chain(repeat=steps, norm=norm, mixing=mixing, coupling=partial(Coupling, univariate=univariate, net=net))
    return Flow(shape, chain(preprocess=preprocess, flatten=Flatten, steps=step), base, context_shape, embedding)
