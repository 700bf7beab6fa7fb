"""Residual flows (Behrmann et al. 2019; Chen et al. 2019) of vectors and of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from flowtrain.bijections import ActNorm, Flatten, Residual, Squeeze
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, count_scales
from flowtrain.nets import LipschitzConvNet, LipschitzMLP


def residual(
    shape: Sequence[int],
    *,
    blocks: int = 8,
    hidden: int = 64,
    depth: int = 2,
    coeff: float = 0.98,
    layer: Factory = Residual,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Actnorm and z = x + g(x), in turn, where the network g contracts (Chen et al. 2019, section 5.1).

    Args:
        shape: of one example; it is flattened to D dimensions.
        blocks: residual layers.
        hidden, depth: units of a hidden layer of each network, and hidden layers.
        coeff: the greatest spectral norm of each of their layers.
        layer: factory of the residual layer, with its estimator; see :class:`flowtrain.bijections.Residual`.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> residual((2,), blocks=2, hidden=16).sample(5).shape
    torch.Size([5, 2])
    """
    net = partial(LipschitzMLP, hidden=hidden, depth=depth, coeff=coeff)
    layers = chain(
        preprocess=preprocess,
        flatten=Flatten,
        norm=ActNorm,
        blocks=chain(repeat=blocks, residual=partial(layer, net=net), norm=ActNorm),
    )
    return Flow(shape, layers, base, context_shape, embedding)


def residual_image(
    shape: Sequence[int],
    *,
    levels: int | None = None,
    blocks: int = 2,
    hidden: int = 32,
    coeff: float = 0.98,
    dense_blocks: int = 2,
    dense_hidden: int = 64,
    layer: Factory = Residual,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Convolutional residual layers at several scales, without factoring out, then fully connected ones (Chen et al.
    2019, appendix E).

    Args:
        shape: (channels, height, width).
        levels: scales, a squeeze between them; None: as often as the sides can be halved.
        blocks: residual layers at each scale, each followed by actnorm.
        hidden: channels of each network.
        coeff: the greatest spectral norm of each of their layers.
        dense_blocks, dense_hidden: residual layers of the flattened latent at the end, and units of their networks.
        layer: factory of the residual layer, with its estimator; see :class:`flowtrain.bijections.Residual`.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> residual_image((1, 4, 4), levels=1, blocks=1, hidden=4).sample(5).shape
    torch.Size([5, 1, 4, 4])
    """
    net = partial(LipschitzConvNet, hidden=hidden, coeff=coeff)
    block = chain(repeat=blocks, residual=partial(layer, net=net), norm=ActNorm)
    count = count_scales(shape, levels, halves_last=False)
    scales: dict[str, Any] = {f"level{i}": chain(squeeze=Squeeze if i else None, blocks=block) for i in range(count)}
    dense = partial(layer, net=partial(LipschitzMLP, hidden=dense_hidden, depth=1, coeff=coeff))
    layers = chain(
        preprocess=preprocess,
        norm=ActNorm,
        **scales,
        flatten=Flatten,
        dense=chain(repeat=dense_blocks, residual=dense, norm=ActNorm) if dense_blocks else None,
    )
    return Flow(shape, layers, base, context_shape, embedding)
