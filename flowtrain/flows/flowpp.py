"""Flow++ (Ho et al. 2019), for images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowtrain.bijections import ActNorm, Chain, Coupling, DenseLinear, Flatten, Halves, MixtureLogistic, Squeeze
from flowtrain.distributions import StandardNormal
from flowtrain.flow import Flow
from flowtrain.flows.parts import Factory, checkerboard, count_scales
from flowtrain.nets import GatedAttentionConvNet


def flowpp(
    shape: Sequence[int],
    *,
    couplings: Sequence[int] = (4, 2, 3),
    hidden: int = 16,
    blocks: int = 1,
    heads: int = 2,
    dropout: float = 0.1,
    univariate: Factory = MixtureLogistic,
    mixing: Factory | None = DenseLinear,
    norm: Factory | None = ActNorm,
    base: Factory = StandardNormal,
    preprocess: Factory | None = None,
    context_shape: Sequence[int] | None = None,
    embedding: Factory | None = None,
) -> Flow:
    """Couplings by mixtures of logistic distributions, with gated convolutions and attention (Ho et al. 2019, sections
    3.2 and 3.3, and the reference code's layout).

    First couplings on a checkerboard; then a squeeze, couplings of halves of the channels, and more on a checkerboard.
    Each follows a norm and a 1×1 convolution, and transforms what the one before left. No variables leave early.

    Args:
        shape: (channels, height, width), with even sides.
        couplings: on the checkerboard, on the channels, and on the second checkerboard.
        hidden: channels of a conditioner.
        blocks: of a conditioner: a gated convolution and attention over all of its pixels each.
        heads: of the attention.
        dropout: in the conditioners.
        univariate, mixing, norm: factories of the couplings' map and of the two layers before each coupling (None: no
            such layer).
        base, preprocess, context_shape, embedding: see :mod:`flowtrain.flows`.

    Raises:
        ValueError: not an image, a side that is odd, or ``couplings`` that are not three numbers of at least 0.

    >>> flowpp((3, 8, 8), couplings=(2, 1, 1), hidden=8, blocks=1).sample(5).shape
    torch.Size([5, 3, 8, 8])
    """
    count_scales(shape, 1)
    are_counts = isinstance(couplings, Sequence) and all(isinstance(one, int) and one >= 0 for one in couplings)
    if not are_counts or len(couplings) != 3:
        raise ValueError(f"couplings={couplings} must be three numbers of at least 0, such as [4, 2, 3]")
    net = partial(GatedAttentionConvNet, hidden=hidden, blocks=blocks, heads=heads, dropout=dropout)

    def group(name: str, count: int, partitions: Sequence[Factory]) -> dict[str, Factory | None]:
        layers: dict[str, Factory | None] = {}
        for number in range(count):
            coupling = partial(Coupling, univariate=univariate, net=net, partition=partitions[number % 2])
            layers |= {f"norm_{name}{number}": norm, f"mixing_{name}{number}": mixing, f"{name}{number}": coupling}
        return layers

    colours: list[Factory] = [partial(checkerboard, colour=colour) for colour in (0, 1)]
    halves: list[Factory] = [Halves, partial(Halves, swap=True)]
    first, channels, last = couplings
    layers = {
        "preprocess": preprocess,
        **group("checkerboard", first, colours),
        "squeeze": Squeeze,
        **group("channels", channels, halves),
        **group("coarse", last, colours),
        "flatten": Flatten,
    }
    return Flow(shape, partial(Chain, layers=layers), base, context_shape, embedding)
