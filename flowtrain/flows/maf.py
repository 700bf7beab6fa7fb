"""Masked autoregressive flows: MADE (Germain et al. 2015), MAF (Papamakarios et al. 2017), IAF (Kingma et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import Autoregressive, BatchNorm, ExpAffine, Flatten, Inverse, MixtureNormal, Reverse
from flowtrain.distributions import Logistic, StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, chain
from flowtrain.nets import MADE


def made(
    shape: Sequence[int],
    *,
    order: str = "sequential",
    hidden: int = 256,
    depth: int = 2,
    degrees: str = "sequential",
    activation: str = "relu",
    dropout: float = 0.0,
    univariate: Factory = ExpAffine,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """One masked autoregressive layer: a Gaussian for each element, given the elements before it (Germain et al. 2015).

    With ``univariate=MixtureNormal, base=Logistic`` it is MADE MoG: a mixture of Gaussians for each element.

    Args:
        shape: of one example; it is flattened to D dimensions.
        order: which element comes first: sequential, reversed or random.
        hidden, depth: units of a hidden layer of the masked network, and hidden layers.
        degrees: of the hidden units: sequential or random.
        activation: relu or tanh.
        dropout: in the network.
        univariate: factory of the map of each element; MAF's affine one makes the conditionals Gaussian.
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> made((3,), hidden=16).sample(5).shape
    torch.Size([5, 3])
    """
    net = partial(MADE, hidden=hidden, depth=depth, degrees=degrees, activation=activation, dropout=dropout)
    layer = partial(Autoregressive, univariate=univariate, net=net, order=order)
    return Flow(
        shape, chain(preprocess=preprocess, flatten=Flatten, autoregressive=layer), base, context_shape, embedding
    )


def maf(
    shape: Sequence[int],
    *,
    steps: int = 5,
    order: str = "sequential",
    hidden: int = 128,
    depth: int = 2,
    degrees: str = "sequential",
    activation: str = "relu",
    dropout: float = 0.0,
    univariate: Factory = ExpAffine,
    mixing: Factory | None = Reverse,
    norm: Factory | None = BatchNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Masked autoregressive layers, a norm after each, the order of the elements reversed between them.

    Each step maps a vector x by three layers (Papamakarios et al. 2017, sections 3.1 to 3.4):

        yᵢ = (xᵢ + tᵢ)·exp(sᵢ), where (tᵢ, sᵢ) is a function of x₁ … xᵢ₋₁        log|det| = Σ sᵢ
        nᵢ = (yᵢ − mᵢ)/√(vᵢ + ε), where m and v are means and variances of y     log|det| = −½ Σ log(vᵢ + ε)
        n in reversed order, the input of the next step                          log|det| = 0

    In the paper's words μ = −t and α = −s. The output of the last step is z, and log p(x) = log N(z; 0, I) + the sum of
    all log|det|.

    :class:`flowtrain.nets.MADE` computes all t and s in one pass, :class:`flowtrain.bijections.ExpAffine` each y and s,
    :class:`flowtrain.bijections.Autoregressive` calls both and sums s. :class:`flowtrain.bijections.BatchNorm` and
    :class:`flowtrain.bijections.Reverse` are the other two lines. :class:`flowtrain.bijections.Chain` sums log|det|
    over layers, and :meth:`flowtrain.flow.Flow.forward` adds log N(z), of
    :class:`flowtrain.distributions.StandardNormal`.

    So a density takes one pass of each network; a sample takes as many steps as there are elements.

    Args:
        shape: of one example; it is flattened to D dimensions.
        steps: autoregressive layers.
        order, hidden, depth, degrees, activation, dropout: of each layer; see :func:`made`.
        univariate, mixing, norm: factories of the layers' map, of the permutation and of the norm after each layer
            (None: no such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    >>> import torch
    >>> maf((3,), hidden=16, context_shape=(2,)).log_prob(torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([5])
    """
    net = partial(MADE, hidden=hidden, depth=depth, degrees=degrees, activation=activation, dropout=dropout)
    layer = partial(Autoregressive, univariate=univariate, net=net, order=order)
    step = chain(repeat=steps, autoregressive=layer, norm=norm, mixing=mixing)
    return Flow(shape, chain(preprocess=preprocess, flatten=Flatten, steps=step), base, context_shape, embedding)


def maf_mog(
    shape: Sequence[int],
    *,
    steps: int = 5,
    order: str = "sequential",
    hidden: int = 128,
    depth: int = 2,
    degrees: str = "sequential",
    activation: str = "relu",
    dropout: float = 0.0,
    components: int = 10,
    univariate: Factory = ExpAffine,
    mixing: Factory | None = Reverse,
    norm: Factory | None = BatchNorm,
    base: Factory = Logistic,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """MAF on a base that is a MADE of mixtures of Gaussians (Papamakarios et al. 2017, section 4).

    Here that base is one more autoregressive layer, whose map is the logit of the mixture's distribution function, on
    a logistic base.

    Args:
        components: Gaussians in the mixture of each element.

    The other arguments are those of :func:`maf`.

    >>> maf_mog((3,), steps=2, hidden=16).sample(5).shape
    torch.Size([5, 3])
    """
    net = partial(MADE, hidden=hidden, depth=depth, degrees=degrees, activation=activation, dropout=dropout)
    layer = partial(Autoregressive, univariate=univariate, net=net, order=order)
    step = chain(repeat=steps, autoregressive=layer, norm=norm, mixing=mixing)
    last = partial(Autoregressive, univariate=partial(MixtureNormal, components=components), net=net, order=order)
    return Flow(
        shape, chain(preprocess=preprocess, flatten=Flatten, steps=step, last=last), base, context_shape, embedding
    )


def iaf(
    shape: Sequence[int],
    *,
    steps: int = 5,
    order: str = "sequential",
    hidden: int = 128,
    depth: int = 2,
    degrees: str = "sequential",
    activation: str = "relu",
    dropout: float = 0.0,
    univariate: Factory = ExpAffine,
    mixing: Factory | None = Reverse,
    norm: Factory | None = BatchNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """MAF with each autoregressive layer inverted (Kingma et al. 2016).

    A sample takes one pass of each network; the density of a point, and so training by likelihood, as many steps as
    elements.

    The arguments are those of :func:`maf`.

    >>> iaf((3,), steps=2, hidden=16).sample(5).shape
    torch.Size([5, 3])
    """
    net = partial(MADE, hidden=hidden, depth=depth, degrees=degrees, activation=activation, dropout=dropout)
    layer = partial(Autoregressive, univariate=univariate, net=net, order=order)
    step = chain(repeat=steps, autoregressive=partial(Inverse, bijection=layer), norm=norm, mixing=mixing)
    return Flow(shape, chain(preprocess=preprocess, flatten=Flatten, steps=step), base, context_shape, embedding)
