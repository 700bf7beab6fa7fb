"""What the libraries' flows are turned into: nodes of a configuration, with the tensors that belong to each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowtrain.errors import UsageError

# what arrays and numbers of numpy are pickled with
NUMPY = [
    *(np._core.multiarray.scalar, np._core.multiarray._reconstruct, np.ndarray, np.dtype),
    *(type(np.dtype(kind)) for kind in (np.bool_, np.uint8, np.int32, np.int64, np.float32, np.float64)),
]


class Layer(NamedTuple):
    """A layer: its node of a configuration, as in conf/model/custom.yaml, and its state."""

    node: dict
    state: dict[str, Tensor]


@dataclass
class Imported:
    """A flow of another library.

    Attributes:
        features: D.
        context: numbers in the context; None without one.
        layers: from data to latent; the latent is standard normal.
    """

    features: int
    context: int | None = None
    layers: list[Layer] = field(default_factory=list)


def no_counterpart(name: str, module: nn.Module, why: str = "") -> UsageError:
    """The refusal of ``module``, which is called ``name`` in its flow."""
    kind = type(module)
    reason = f": {why}" if why else ""
    return UsageError(f"{name} ({kind.__module__}.{kind.__name__}) has no counterpart in flowtrain{reason}")


def node(target: str, **arguments) -> dict:
    """What ``target``, such as bijections.ActNorm, is called with."""
    return {"_target_": f"flowtrain.{target}", "_partial_": True, **arguments}


def permutation(order: Tensor) -> Layer:
    order = order.detach().cpu().long()
    return Layer(node("bijections.Permutation", order=order.tolist()), {"order": order, "back": order.argsort()})


def affine(log_scale: Tensor, shift: Tensor) -> Layer:
    """z = x·exp(log_scale) + shift, elementwise."""
    log_scale, shift = log_scale.detach().flatten(), shift.detach().flatten()
    state = {"log_scale": log_scale, "bias": shift * (-log_scale).exp(), "started": torch.tensor(True)}
    return Layer(node("bijections.ActNorm"), state)


def triangular(lower: Tensor, upper: Tensor) -> Layer:
    """z = L·U·x for a lower matrix, whose diagonal is 1, and an upper one, whose diagonal is positive."""
    n = len(lower)
    lu = lower.tril(-1) + upper.triu(1) + upper.diagonal().log().diag()
    state = {"lu": lu.detach(), "sign": torch.ones(n), "order": torch.arange(n), "started": torch.tensor(True)}
    return Layer(node("bijections.LULinear", start="identity"), state)


def linear_layers(prefix: str, module: nn.Linear, weight: Tensor | None = None) -> dict[str, Tensor]:
    weight = module.weight if weight is None else weight
    return {f"{prefix}.weight": weight.detach(), f"{prefix}.bias": module.bias.detach()}


# ---- univariate maps ------------------------------------------------------------------------------------------------


def spline_parameters(numbers: Tensor, bins: int, hidden: int | None, least_slope: float) -> Tensor:
    """The parameters (…, 3·bins − 1) of nflows' and normflows' splines as ours: they divide the logits by √hidden,
    and their slopes are 1 at log(exp(1 − least) − 1)."""
    scale = 1 / math.sqrt(hidden or 1)
    logits, slopes = numbers[..., : 2 * bins], numbers[..., 2 * bins :]
    return torch.cat((logits * scale, slopes - math.log(math.expm1(1 - least_slope))), -1)


def convert_last(weight: Tensor, bias: Tensor, convert) -> tuple[Tensor, Tensor]:
    """The last layer of a network, (elements, params, …), after its outputs went through an affine ``convert`` of
    parameters in the last axis."""
    matrix = weight.movedim(1, -1)
    return (convert(matrix) - convert(torch.zeros_like(matrix))).movedim(-1, 1), convert(bias)


# ---- masked networks ------------------------------------------------------------------------------------------------


def masked_state(
    layers: list[tuple[Tensor, Tensor]],
    degrees: list[Tensor],
    elements: Tensor,
    context: Tensor | None,
) -> dict[str, Tensor]:
    """The state of our masked network from the weights, masks applied, and biases of another's layers.

    Args:
        degrees: of the hidden units of each layer, in the order of ``layers``: the elements that a unit depends on.
        elements: the element that comes first, second, ….
        context: weights (hidden, context) of the first layer, or None.
    """
    orders = [layer.argsort(stable=True) for layer in degrees]
    state = {}
    for i, (weight, bias) in enumerate(layers):
        columns = elements if i == 0 else orders[i - 1]
        if i < len(orders):
            weight, bias = weight[orders[i]], bias[orders[i]]
        else:
            weight = weight.unflatten(0, (len(elements), -1))[elements].flatten(0, 1)
            bias = bias.unflatten(0, (len(elements), -1))[elements].flatten()
        state |= {f"net.linears.{i}.weight": weight[:, columns], f"net.linears.{i}.bias": bias}
    state["net.degrees"] = degrees[0][orders[0]].long()
    if context is not None:
        state["net.context.weight"] = context[orders[0]]
    return {name: value.detach().contiguous() for name, value in state.items()}


def same_degrees(degrees: list[Tensor]) -> bool:
    """Whether the units of all hidden layers have the same degrees, as our networks' have."""
    first = degrees[0].sort().values
    return all(torch.equal(first, layer.sort().values) for layer in degrees)


def autoregressive(univariate: dict, net: dict, state: dict, elements: Tensor, inverted: bool = False) -> Layer:
    sequential = torch.equal(elements, torch.arange(len(elements)))
    order = "sequential" if sequential else "random"
    if not sequential:
        state = state | {"order": elements, "back": elements.argsort()}
    layer = node("bijections.Autoregressive", univariate=univariate, net=net, order=order)
    if not inverted:
        return Layer(layer, state)
    inner = {f"bijection.{name}": value for name, value in state.items()}
    return Layer(node("bijections.Inverse", bijection=layer), inner)


# ---- couplings ------------------------------------------------------------------------------------------------------


def coupling(name, module, conditioning: Tensor, transformed: Tensor, univariate: dict, net: dict, state: dict, **more):
    """The layers of a coupling on any two halves of the elements: permutations around one on the first and the last."""
    a, b = len(conditioning), len(transformed)
    if (a, b) == ((a + b) // 2, (a + b) - (a + b) // 2):
        order, swap = torch.cat((conditioning, transformed)), False
    elif (b, a) == ((a + b) // 2, (a + b) - (a + b) // 2):
        order, swap = torch.cat((transformed, conditioning)), True
    else:
        raise no_counterpart(name, module, f"its mask conditions on {a} and transforms {b} elements, not halves")
    halves = node("bijections.Halves", swap=swap)
    middle = Layer(node("bijections.Coupling", univariate=univariate, net=net, partition=halves, **more), state)
    return unpermuted(order, middle)


def unpermuted(order: Tensor, middle: Layer) -> Iterator[Layer]:
    if torch.equal(order, torch.arange(len(order))):
        yield middle
    else:
        yield from (permutation(order), middle, permutation(order.argsort()))


def by_parameter(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The last layer of a coupling's network with rows by parameter, from (elements, params, …)."""
    return {"net.last.weight": weight.transpose(0, 1).flatten(0, 1), "net.last.bias": bias.T.flatten()}
