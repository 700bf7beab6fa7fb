"""Continuous flows with residual networks, for flow matching (Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import ActNorm, Flatten, LULinear, Radial
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, check_image, training_solver
from flowtrain.nets import VelocityConvNet, VelocityGains, VelocityMLP


def cnf(
    shape: Sequence[int],
    *,
    hidden: int = 128,
    depth: int = 3,
    dropout: float = 0.0,
    filters: int | None = None,
    whiten: bool = True,
    radial: bool = False,
    ode: Factory = training_solver,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """One differential equation, whose velocity is a :class:`flowtrain.nets.VelocityMLP` unless ``filters`` is given.

    Args:
        shape: of one example; it is flattened to D dimensions.
        hidden, depth, dropout: of the network.
        filters: of a :class:`flowtrain.nets.VelocityGains`; None: a :class:`flowtrain.nets.VelocityMLP`.
        whiten: the first batch starts two layers before the equation, which give the data mean 0, variance 1 and no
            correlations, as the network expects.
        radial: after these, a layer that gives the data the norms of noise, and two that whiten them once more: for
            many dimensions whose scales rise and fall together, as those of patches of photographs; see
            :class:`flowtrain.bijections.Radial`.
        ode: factory of the layer, with its solver; see :class:`flowtrain.bijections.Continuous`.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> cnf((2,), hidden=16).sample(5).shape
    torch.Size([5, 2])
    """
    whitening = chain(norm=ActNorm, mixing=partial(LULinear, start="whitening")) if whiten else None
    net: Factory = VelocityMLP if filters is None else partial(VelocityGains, filters=filters)
    layers = chain(
        preprocess=preprocess,
        flatten=Flatten,
        whitening=whitening,
        radial=Radial if radial else None,
        whitening_again=whitening if radial else None,
        ode=partial(ode, net=partial(net, hidden=hidden, depth=depth, dropout=dropout)),
    )
    return Flow(shape, layers, base, context_shape, embedding)


def cnf_image(
    shape: Sequence[int],
    *,
    hidden: int = 32,
    depth: int = 1,
    levels: int | None = None,
    dropout: float = 0.0,
    actnorm: bool = True,
    ode: Factory = training_solver,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """One differential equation of whole images, whose velocity is a :class:`flowtrain.nets.VelocityConvNet`.

    Args:
        shape: (channels, height, width).
        hidden, depth, levels, dropout: of the network.
        actnorm: the first batch starts a layer before the equation, which gives each channel mean 0 and variance 1.
        ode: factory of the layer, with its solver; see :class:`flowtrain.bijections.Continuous`.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> cnf_image((1, 8, 8), hidden=8).sample(5).shape
    torch.Size([5, 1, 8, 8])
    """
    check_image(shape)
    net = partial(VelocityConvNet, hidden=hidden, depth=depth, levels=levels, dropout=dropout)
    layers = chain(preprocess=preprocess, norm=ActNorm if actnorm else None, ode=partial(ode, net=net), flatten=Flatten)
    return Flow(shape, layers, base, context_shape, embedding)
