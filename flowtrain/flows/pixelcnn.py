"""PixelCNN (van den Oord et al. 2016) as a flow, for images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import (
    Autoregressive,
    Dequantize,
    DiscretizedLogistic,
    Flatten,
    Logit,
    Patches,
    PiecewiseLinear,
)
from flowtrain.distributions import Logistic
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, check_image
from flowtrain.nets import PixelCNN

FLOOR = 1e-6  # the smallest probability of a grey level
KNOTS = 33  # between which the logits of more grey levels than twice as many are interpolated


def pixelcnn(
    shape: Sequence[int],
    *,
    grey_levels: int,
    hidden: int = 64,
    depth: int = 2,
    levels: int = 2,
    dropout: float = 0.0,
    components: int | None = None,
    atoms: Sequence[int] = (),
    base: Factory = Logistic,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Causal convolutions give each grey level of a pixel a probability, from the pixels before it.

    Each number is mapped by the distribution function of a histogram with one bin for each grey level, and the network
    reads the levels without the noise. So the density is the same throughout a bin, and the bound that dequantization
    gives is the probability itself. It works on
    the unit interval that dequantization maps to, so it takes no ``preprocess``, and it has no ``univariate``.

    Args:
        shape: (channels, height, width), of integers 0 … grey_levels − 1.
        grey_levels: bins of a histogram.
        hidden, depth, levels, dropout: of the network; see :class:`flowtrain.nets.PixelCNN`.
        components: the histogram's bins have the probabilities of a mixture of so many logistic distributions (Salimans
            et al. 2017, section 2.1); None: each bin has a parameter of its own.
        atoms: grey levels that get a probability besides that of the mixture, such as those of paper and ink.
        base, context_shape, embedding: see :mod:`flowtrain.flows`.

    Raises:
        ValueError: not an image, not of integers, or ``atoms`` without ``components``.

    >>> pixelcnn((1, 4, 4), grey_levels=5, hidden=8).sample(5).dtype
    torch.uint8
    """
    check_image(shape)
    if grey_levels is None:
        raise ValueError("this model takes images of integers; these are real numbers")
    histogram: Factory = partial(PiecewiseLinear, bins=grey_levels, floor=FLOOR)
    if components is not None and (not isinstance(components, int) or components < 1):
        raise ValueError(f"components={components} must be a whole number of at least 1, or null")
    if not isinstance(atoms, Sequence) or not all(isinstance(one, int) for one in atoms):
        raise ValueError(f"atoms={atoms} must be a list of grey levels, such as [0, 255]")
    if len(atoms) and components is None:
        raise ValueError(f"atoms={list(atoms)}: each grey level has a probability of its own; set components")
    if components is not None:
        histogram = partial(
            DiscretizedLogistic, bins=grey_levels, components=components, floor=FLOOR, atoms=list(atoms)
        )
    knots = KNOTS if components is None and grey_levels > 2 * KNOTS else 0
    net = partial(PixelCNN, image=tuple(shape), bins=grey_levels, hidden=hidden, depth=depth, levels=levels)
    net = partial(net, dropout=dropout, knots=knots)
    layers = chain(
        dequantize=partial(Dequantize, grey_levels=grey_levels),
        pixels=partial(Patches, size=1),
        flatten=Flatten,
        autoregressive=partial(Autoregressive, univariate=histogram, net=net),
        logit=partial(Logit, alpha=0.0),  # from uniform to logistic
    )
    return Flow(shape, layers, base, context_shape, embedding)
