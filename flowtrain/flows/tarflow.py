"""TarFlow (Zhai et al. 2024) and its deep-shallow arrangement (Gu et al. 2025), for images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import Autoregressive, Chain, Dequantize, ExpAffine, Flatten, Logit, Patches, PiecewiseLinear
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, check_image, smallest_patch
from flowtrain.nets import CausalTransformer, HiddenContext


def tarflow(
    shape: Sequence[int],
    *,
    patch: int | None = None,
    depths: Sequence[int] = (2, 2, 2, 2),
    hidden: int = 64,
    heads: int = 4,
    expand: int = 4,
    dropout: float = 0.0,
    histogram: bool = False,
    offsets: Sequence[int] = (1,),
    grey_levels: int | None = None,
    hide_context: float = 0.0,
    univariate: Factory = ExpAffine,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Autoregressive blocks over the patches of an image, in alternating direction (Zhai et al. 2024).

    Block k maps the tokens x₁ … x_T, each the numbers of a patch, by

        z_i = (x_i + t_i)·exp(s_i), where (t_i, s_i) is a function of x₁ … x_{i−1}        log|det| = Σ s_i

    with causal attention as that function; every second block takes the tokens from the last to the first. In the
    paper's words μ = −t and α = −s. A density takes one pass of each block, a sample T steps of each.

    Args:
        shape: (channels, height, width).
        patch: side of a patch, in pixels; None: the smallest that divides the sides and leaves at most 256 tokens.
        depths: attention layers of each block, from the data to the latent. (2, 2, 8) is the deep-shallow arrangement
            of STARFlow (Gu et al. 2025): the block that samples come from first is the deep one.
        hidden, heads, expand: channels, heads of attention, and width of the feed-forward layers in channels.
        dropout: in the attention.
        histogram: the first block gives each number a histogram, with one bin for each grey level, in place of a normal
            distribution (as :func:`flowtrain.flows.autoregressive`); the others work on the logit of its distribution
            function. It dequantizes itself and takes no ``preprocess``.
        offsets: how far back the patches lie that each position reads at once; the attention reads all.
        grey_levels: of the data, for ``histogram``.
        hide_context: share of the training examples whose context is hidden, so that guidance can be used; see
            :func:`flowtrain.bijections.decoding.guidance`.
        univariate: factory of the map of each number; guidance takes the affine one.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    Raises:
        ValueError: not an image, a ``patch`` that does not divide its sides, no ``depths``, a ``histogram`` with
            ``preprocess`` or of real numbers, or ``hide_context`` without a context.

    >>> flow = tarflow((1, 8, 8), patch=2, depths=(1, 2), hidden=16)
    >>> flow.sample(5).shape
    torch.Size([5, 1, 8, 8])
    """
    check_image(shape)
    if not isinstance(depths, Sequence) or not depths:
        raise ValueError(f"depths={depths} must be a list with a number for each block, such as [2, 2]")
    if hide_context and context_shape is None:
        raise ValueError(f"hide_context={hide_context}: there is no context to hide; set dataset.context=label")
    attention = partial(
        CausalTransformer, hidden=hidden, heads=heads, expand=expand, dropout=dropout, offsets=list(offsets)
    )
    blocks: dict[str, Factory] = {}
    for number, depth in enumerate(depths):
        order = "reversed" if number % 2 else "sequential"
        net = partial(attention, depth=depth)
        blocks[f"block{number}"] = partial(Autoregressive, univariate=univariate, net=net, order=order)
    if histogram:
        if preprocess is not None or grey_levels is None:
            raise ValueError("histogram=true takes integers as they are; use preprocess=none")
        preprocess = partial(Dequantize, grey_levels=grey_levels)
        first = partial(blocks.pop("block0"), univariate=partial(PiecewiseLinear, bins=grey_levels, floor=1e-5))
        blocks = {"block0": first, "logit": partial(Logit, alpha=0.0), **blocks}
    if hide_context:
        embedding = partial(HiddenContext, share=hide_context, embedding=embedding)
    size = smallest_patch(shape) if patch is None else patch
    layers = {"preprocess": preprocess, "patches": partial(Patches, size=size), **blocks, "flatten": Flatten}
    return Flow(shape, partial(Chain, layers=layers), base, context_shape, embedding)
