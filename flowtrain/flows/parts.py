"""Parts that several flows are made of, as factories ``part(shape=…, context_shape=…)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import Any

from flowtrain.bijections import (
    ActNorm,
    Additive,
    Alternate,
    Autoregressive,
    BatchNorm,
    Bijection,
    BoundColumns,
    Box,
    Center,
    Chain,
    Checkerboard,
    CircleToLine,
    CircularRationalQuadratic,
    Continuous,
    Coupling,
    Dequantize,
    DequantizeColumns,
    Elementwise,
    ExpAffine,
    FillMissing,
    Flatten,
    Halves,
    Logit,
    LULinear,
    PackedCheckerboard,
    Positive,
    QuantileColumns,
    Regression,
    Shuffle,
    Simplex,
    Squeeze,
    Standardize,
    StandardizeChannels,
    Turns,
    Unsqueeze,
)
from flowtrain.bijections.bijection import check_shape
from flowtrain.nets import MLP, CircularMADE, ConvNet

Factory = Callable[..., Any]  # of a layer, a univariate map or a base distribution: called with ``shape``
PER_CHANNEL = (1, 2)  # the axes of an image along which all pixels of a channel share their parameters
PATCHES = 256  # most of them, where a larger patch divides the sides


def chain(repeat: int = 1, **layers: Factory | None) -> Factory:
    """A factory of named layers in a row, ``repeat`` times, each time with parameters of its own. None is left out.

    >>> from flowtrain.bijections import ActNorm, LULinear
    >>> list(dict(chain(norm=ActNorm, mixing=LULinear)(shape=(3,)).named_children()))
    ['norm', 'mixing']
    """
    return partial(Chain, layers=layers, repeat=repeat)


# ODE layers with looser tolerances in training than in evaluation, and gradients through the solver's steps.
training_solver = partial(Continuous, train_tolerance=1e-3, steps=4, adjoint=False)


def check_image(shape: Sequence[int]) -> None:
    """Raise ValueError if ``shape`` is not that of an image."""
    if len(check_shape(shape)) != 3:
        raise ValueError(
            f"this model takes images (channels, height, width), not {list(shape)}; maf, nsf_coupling,"
            " nsf_autoregressive, glow_vector and realnvp_vector take rows of numbers"
        )


def halved_sides(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The sides of an image, and those after each time that both can be halved.

    >>> halved_sides((3, 32, 48))
    [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]

    Raises:
        ValueError: ``shape`` is not that of an image.
    """
    check_image(shape)
    height, width = shape[1:]
    sides = [(height, width)]
    while height % 2 == width % 2 == 0:
        height, width = height // 2, width // 2
        sides.append((height, width))
    return sides


def count_scales(shape: Sequence[int], levels: int | None, halves_last: bool = True) -> int:
    """The scales of a multi-scale flow that halves the sides in each: ``levels``, or for None as many as leave sides of
    at least 4 pixels, or of 2 where they start from 8 or fewer; at least one.

    Args:
        halves_last: the last scale halves the sides too.

    Raises:
        ValueError: ``shape`` is not that of an image, or cannot be halved so often. The message says how often.

    >>> [count_scales(shape, None) for shape in ((3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 32, 48))]
    [3, 2, 2, 3]
    """
    sides = halved_sides(shape)
    halvings, first = len(sides) - 1, "×".join(map(str, sides[0]))
    most = halvings if halves_last else halvings + 1
    if not most:
        raise ValueError(
            f"images of {first} pixels cannot be halved, because a side is odd, and this model halves them; realnvp,"
            " ffjord_image and the models of vectors, such as maf, take them"
        )
    if levels is None:
        smallest = 4 if min(sides[0]) > 8 else 2
        return max(1, sum(min(pair) >= smallest for pair in sides[1:]))
    if levels > most:
        path = " → ".join("×".join(map(str, pair)) for pair in sides)
        times = f"{halvings} time{'' if halvings == 1 else 's'}"
        raise ValueError(f"levels={levels} must be at most {most}: the sides can be halved {times} ({path})")
    return levels


def smallest_patch(shape: Sequence[int], numbers: int = 1) -> int:
    """The smallest side of a patch that divides those of an image, leaves at most 256 patches, and gives a patch so
    many ``numbers``; if none does, the largest that divides them.

    >>> [smallest_patch((1, side, side)) for side in (8, 28, 32, 64)]
    [1, 2, 2, 4]
    """
    channels, height, width = shape
    common = gcd(height, width)
    sides = [side for side in range(1, common + 1) if common % side == 0 and channels * side**2 >= numbers]
    return next((side for side in sides if height * width <= PATCHES * side**2), common)


def checkerboard(shape, colour: int = 0) -> Checkerboard | PackedCheckerboard:
    """The partition by the colours of a checkerboard, packed where the width is even: half the work."""
    return Checkerboard(shape, colour) if shape[-1] % 2 else PackedCheckerboard(shape, colour)


def single_scale(shape, levels: int, level: Factory, context_shape=None) -> Bijection:
    """Levels one after another, without factoring out: use it in place of :class:`MultiScale`."""
    layers = chain(levels=chain(repeat=levels, level=level), flatten=Flatten)
    return layers(shape=shape, context_shape=context_shape)


# ---- preprocessing: the first links of a flow, so that its density is that of the raw data


def center(shape, grey_levels: int, dequantize: Factory = Dequantize, context_shape=None) -> Bijection:
    """Integers 0 … grey_levels − 1 to (−½, ½): dequantization, by default uniform, then centring."""
    layers = chain(dequantize=partial(dequantize, grey_levels=grey_levels), center=Center)
    return layers(shape=shape, context_shape=context_shape)


def logit(
    shape, grey_levels: int, alpha: float = 0.01, dequantize: Factory = Dequantize, context_shape=None
) -> Bijection:
    """Integers 0 … grey_levels − 1 to the real line: dequantization, by default uniform, then
    logit(alpha + (1 − 2·alpha)·x)."""
    layers = chain(dequantize=partial(dequantize, grey_levels=grey_levels), logit=partial(Logit, alpha=alpha))
    return layers(shape=shape, context_shape=context_shape)


def normalize(shape, grey_levels: int | None = None, dequantize: Factory = Dequantize, context_shape=None) -> Bijection:
    """Integers 0 … grey_levels − 1 as by :func:`center`; real numbers (None) to mean 0 and deviation 1 in each channel,
    by the train split."""
    if grey_levels is None:
        return chain(standardize=StandardizeChannels)(shape=shape, context_shape=context_shape)
    return center(shape, grey_levels, dequantize, context_shape)


def noise_couplings(
    shape,
    steps: int = 4,
    hidden: int = 32,
    univariate: Factory = partial(ExpAffine, bound=2.0),
    net: Factory | None = None,
    context_shape=None,
) -> Bijection:
    """Couplings that depend on features of the data, for :class:`flowtrain.bijections.VariationalDequantize`.

    Images whose features have half their sides are squeezed. Couplings then transform every second column, the others,
    half of the squeezed channels (of one channel, every second row), the other half, and so on. At equal sides they
    transform the two colours of a checkerboard; of vectors, every second element and the others.

    Args:
        shape: of one event.
        steps: couplings.
        hidden: channels, or units, of their networks.
        univariate: factory of their map. A bound keeps the noise far wider than a rounding.
        net: factory of other networks, in place of those with ``hidden``; None: a ConvNet for images, else an MLP.
        context_shape: of the features.

    >>> import torch
    >>> noise = noise_couplings((1, 8, 8), steps=2, context_shape=(3, 4, 4))
    >>> noise(torch.zeros(5, 1, 8, 8), torch.zeros(5, 3, 4, 4))[0].shape
    torch.Size([5, 1, 8, 8])

    Raises:
        ValueError: ``steps`` below 1, or what a network refuses.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    is_image = len(shape) == 3
    is_squeezed = is_image and context_shape is not None and tuple(context_shape[1:]) != tuple(shape[1:])
    partitions: list[Factory] = [partial(Alternate, first=1), partial(Alternate, first=0)]
    if is_squeezed:
        partitions += [Halves, partial(Halves, swap=True)]
    elif is_image:
        partitions = [partial(Checkerboard, colour=0), partial(Checkerboard, colour=1)]
    net = net or (partial(ConvNet, hidden=hidden, norm=None) if is_image else partial(MLP, hidden=hidden))
    layers: dict[str, Factory] = {
        f"coupling{i}": partial(Coupling, univariate=univariate, net=net, partition=partitions[i % len(partitions)])
        for i in range(steps)
    }
    if is_squeezed:
        layers = {"squeeze": Squeeze, **layers, "unsqueeze": Unsqueeze}
    return Chain(shape, layers, context_shape=context_shape)


def standardize(shape, columns=None, context_shape=None) -> Bijection:
    """The columns of a table to mean 0 and deviation 1, by its train split; see :func:`column_links` for what comes
    first."""
    return Chain(shape, {**column_links(columns), "standardize": Standardize}, context_shape=context_shape)


def regression(shape, columns=None, context_shape=None) -> Bijection:
    """:func:`standardize`, then what a linear regression on the context leaves, which is started from data and trained
    with the flow; see :class:`flowtrain.bijections.Regression`."""
    layers = {**column_links(columns), "standardize": Standardize, "regression": Regression}
    return Chain(shape, layers, context_shape=context_shape)


def quantile(shape, columns=None, bins: int = 32, context_shape=None) -> Bijection:
    """Each column to a nearly normal one by a spline through the quantiles of the train split; see
    :func:`column_links` for what comes first."""
    layers = {**column_links(columns), "quantile": partial(QuantileColumns, bins=bins)}
    return Chain(shape, layers, context_shape=context_shape)


def box(shape, low=0.0, high=1.0, columns=None, grey_levels: int | None = None, context_shape=None) -> Bijection:
    """Real numbers between ``low`` and ``high``, as all samples are, to the real line, then standardized by the train
    split; see :class:`flowtrain.bijections.Box`."""
    return _bounded("box", partial(Box, low=low, high=high), shape, columns, grey_levels, context_shape)


def positive(shape, columns=None, grey_levels: int | None = None, context_shape=None) -> Bijection:
    """Positive numbers, as all samples are, to their logarithms, then standardized by the train split."""
    return _bounded("positive", Positive, shape, columns, grey_levels, context_shape)


def simplex(shape, columns=None, grey_levels: int | None = None, context_shape=None) -> Bijection:
    """Vectors of shares that sum to 1, as all samples do, to logarithms of ratios, then standardized by the train
    split; see :class:`flowtrain.bijections.Simplex`."""
    return _bounded("simplex", Simplex, shape, columns, grey_levels, context_shape)


def _bounded(name: str, support: Factory, shape, columns, grey_levels: int | None, context_shape) -> Bijection:
    if grey_levels is not None:
        raise ValueError(f"{name} takes real numbers; these are integers from 0 to {grey_levels - 1}")
    for column in columns or ():
        if column.kind != "real" or column.missing:
            kind = "real with missing values" if column.missing else column.kind
            raise ValueError(
                f"{name} takes real columns; '{column.name}' is {kind}. preprocess=standardize takes it, and"
                " bounds of columns as dataset.types={x: [0, 1]}"
            )
    return chain(support=support, standardize=StandardizeChannels)(shape=shape, context_shape=context_shape)


def column_links(columns=None) -> dict[str, Factory | None]:
    """What maps the values of a table to real numbers: noise for whole numbers, then, where ``columns``, the encoded
    columns of a :class:`flowtrain.data.Columns`, have them, noise for missing values and a map for bounds."""
    columns = columns or ()
    bounded = any(column.kind == "real" and (column.low, column.high) != (None, None) for column in columns)
    return {
        "dequantize": DequantizeColumns,
        "fill": FillMissing if any(column.missing for column in columns) else None,
        "bound": BoundColumns if bounded else None,
    }


def circular(shape, bins: int = 8, hidden: int = 64, depth: int = 2, context_shape=None) -> Bijection:
    """Angles to a standard normal vector, by splines of the circle (Rezende et al. 2020, section 2.1.2).

    A masked network computes the parameters of an angle's spline from the context and from the sines and cosines of the
    angles before it. A spline takes the angle to a uniform point of the circle, Φ⁻¹ takes that to the line.
    """
    layers = chain(
        turns=Turns,
        splines=partial(
            Autoregressive,
            univariate=partial(CircularRationalQuadratic, bins=bins),
            net=partial(CircularMADE, hidden=hidden, depth=depth),
        ),
        line=CircleToLine,
    )
    return layers(shape=shape, context_shape=context_shape)


# ---- mixing of channels, and norms


def permuted_lu(shape, context_shape=None) -> Bijection:
    """A random permutation, L·U from the identity, and a bias (Durkan et al. 2019, appendix B.1)."""
    bias = partial(Elementwise, univariate=Additive, share=PER_CHANNEL)
    layers = chain(permutation=Shuffle, lu=partial(LULinear, start="identity"), bias=bias)
    return layers(shape=shape, context_shape=context_shape)


def permuted_lu_actnorm(shape, context_shape=None) -> Bijection:
    """:func:`permuted_lu` with actnorm in place of the bias, before the linear layer.

    The linear layer then mixes numbers of mean 0 and deviation 1 whatever the data are.
    """
    layers = chain(permutation=Shuffle, actnorm=ActNorm, lu=partial(LULinear, start="identity"))
    return layers(shape=shape, context_shape=context_shape)


def batchnorm_affine(shape, eps: float = 1e-5, momentum: float = 0.1, context_shape=None) -> Bijection:
    """Batch normalization, then a learned scale and shift (Papamakarios et al. 2017)."""
    normalize = partial(BatchNorm, eps=eps, momentum=momentum)
    affine = partial(Elementwise, univariate=ExpAffine, share=PER_CHANNEL)
    return chain(normalize=normalize, affine=affine)(shape=shape, context_shape=context_shape)
