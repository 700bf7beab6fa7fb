"""An autoregressive model of the pixels of small images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import Autoregressive, Dequantize, Flatten, Logit, PiecewiseLinear
from flowtrain.distributions import Logistic
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain, check_image
from flowtrain.nets import CausalTransformer


def autoregressive(
    shape: Sequence[int],
    *,
    grey_levels: int,
    hidden: int = 64,
    depth: int = 2,
    heads: int = 4,
    dropout: float = 0.1,
    offsets: list[int] | None = None,
    base: Factory = Logistic,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Causal attention gives each pixel a histogram, with one bin for each grey level, from the pixels before it.

    It works on the unit interval that dequantization maps to, so it takes no ``preprocess``, and it has no
    ``univariate``: that is the histogram's distribution function (Müller et al. 2019, section 4.1).

    Args:
        shape: (channels, height, width), of integers 0 … grey_levels − 1.
        grey_levels: bins of a histogram.
        hidden, depth, heads: channels, blocks and heads of attention.
        dropout: in the attention.
        offsets: how far back the pixels lie that enter each token; None: the pixel to the left and the one above.
        base, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> autoregressive((1, 4, 4), grey_levels=5, hidden=8).sample(5).dtype
    torch.uint8
    """
    check_image(shape)
    if grey_levels is None:
        raise ValueError("this model takes images of integers; these are real numbers")
    net = partial(
        CausalTransformer,
        hidden=hidden,
        depth=depth,
        heads=heads,
        dropout=dropout,
        offsets=[1, shape[-1]] if offsets is None else offsets,
    )
    histogram = partial(PiecewiseLinear, bins=grey_levels, floor=1e-5)
    layers = chain(
        dequantize=partial(Dequantize, grey_levels=grey_levels),
        flatten=Flatten,
        autoregressive=partial(Autoregressive, univariate=histogram, net=net),
        logit=partial(Logit, alpha=0.0),  # from uniform to logistic
    )
    return Flow(shape, layers, base, context_shape, embedding)
