"""Jet (Kolesnikov et al. 2024), for images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import Chain, Coupling, DoubleSigmoidAffine, Flatten, Halves, Shuffle, Squeeze
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, check_image, checkerboard, smallest_patch
from flowtrain.nets import VisionTransformer


def jet(
    shape: Sequence[int],
    *,
    patch: int | None = None,
    steps: int = 10,
    spatial: int = 5,
    hidden: int = 32,
    depth: int = 1,
    heads: int = 4,
    expand: int = 4,
    dropout: float = 0.0,
    univariate: Factory = DoubleSigmoidAffine,
    mixing: Factory | None = Shuffle,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Affine couplings of patches, whose conditioners are vision transformers (Kolesnikov et al. 2024, section 3).

    The image is cut into patches, whose numbers are the channels of all layers; no variables leave early. Most
    couplings transform half of the channels, after a random permutation of them; every fifth transforms half of the
    patches, on a checkerboard.

    Args:
        shape: (channels, height, width).
        patch: side of a patch, in pixels; None: the smallest that divides the sides, gives a patch at least two
            numbers and leaves at most 256 patches.
        steps: couplings.
        spatial: every so many couplings, one transforms patches in place of channels.
        hidden, depth, heads, expand: channels of a conditioner, its blocks, their heads of attention, and the width of
            their feed-forward layers in channels.
        dropout: in the conditioners.
        univariate: factory of the map of each number.
        mixing: factory of the layer before each coupling of channels (None: no such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    Raises:
        ValueError: not an image, a ``patch`` that does not divide its sides or is the whole image, a patch of one
            number, or ``steps`` or ``spatial`` below 1.

    >>> jet((1, 8, 8), steps=3, hidden=16).sample(5).shape
    torch.Size([5, 1, 8, 8])
    """
    check_image(shape)
    if steps < 1 or spatial < 1:
        raise ValueError(f"steps={steps} and spatial={spatial} must be at least 1")
    size = smallest_patch(shape, numbers=2) if patch is None else patch
    if steps >= spatial and tuple(shape[1:]) == (size, size):
        raise ValueError(f"shape={tuple(shape)}: a patch of {size}×{size} is the whole image; couplings need two")
    net = partial(VisionTransformer, hidden=hidden, depth=depth, heads=heads, expand=expand, dropout=dropout)
    coupling = partial(Coupling, univariate=univariate, net=net)
    layers: dict[str, Factory | None] = {"preprocess": preprocess, "patches": partial(Squeeze, size=size)}
    for number in range(steps):
        round, place = divmod(number, spatial)
        if place == spatial - 1:
            layers[f"spatial{number}"] = partial(coupling, partition=partial(checkerboard, colour=round % 2))
        else:
            layers |= {f"mixing{number}": mixing, f"channels{number}": partial(coupling, partition=Halves)}
    return Flow(shape, partial(Chain, layers=layers | {"flatten": Flatten}), base, context_shape, embedding)
