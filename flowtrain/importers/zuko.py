"""Flows of zuko (Rozet et al.): masked autoregressive ones, ``zuko.flows.MAF`` and ``zuko.flows.NSF``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

from torch import Tensor, nn

from flowtrain.importers.layers import (
    Imported,
    Layer,
    affine,
    autoregressive,
    masked_state,
    no_counterpart,
    node,
    same_degrees,
)

MODULES = ("zuko.flows",)  # whose classes a pickled flow may name
PICKLED = [functools.partial]  # and what else it may name
ACTIVATIONS = {"ReLU": "relu", "Tanh": "tanh"}


def log_prob(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    return flow(context).log_prob(x)


def read(flow: nn.Module) -> Imported:
    """The layers of a flow.

    Raises:
        UsageError: a module without a counterpart, which is named.
    """
    if not hasattr(flow, "transform") or not hasattr(flow, "base"):
        raise no_counterpart("flow", flow, "give a zuko.flows.Flow")
    base = flow.base(None)
    normal = getattr(base, "base_dist", None)
    if type(base).__name__ not in ("DiagNormal", "Independent") or type(normal).__name__ != "Normal":
        raise no_counterpart("base", flow.base)
    transforms = [*getattr(flow.transform, "transforms", [flow.transform])]
    features = normal.loc.shape[-1]
    found = Imported(features)
    for i, module in enumerate(transforms):
        found.layers += _layers(f"transform.{i}", module, found)
    found.layers.append(affine(-normal.scale.log(), -normal.loc / normal.scale))
    return found


def _layers(name: str, module: nn.Module, found: Imported) -> Iterator[Layer]:
    if type(module).__name__ != "MaskedAutoregressiveTransform":
        raise no_counterpart(name, module)
    if module.order is None or module.passes != found.features:
        raise no_counterpart(name, module, "it is not autoregressive in single elements")
    layers = [*module.hyper]
    linears, activations = layers[::2], {type(layer).__name__ for layer in layers[1::2]}
    if any(type(layer).__name__ != "MaskedLinear" for layer in linears) or len(activations) != 1:
        raise no_counterpart(f"{name}.hyper", module.hyper, "it is not masked layers with one activation")
    (activation,) = activations
    if activation not in ACTIVATIONS:
        raise no_counterpart(f"{name}.hyper", module.hyper, f"its activation {activation} is not ReLU or Tanh")
    context = linears[0].in_features - found.features
    found.context = context or None
    sees, degrees = linears[0].mask[:, : found.features], []
    for i, linear in enumerate(linears[:-1]):
        sees = sees if i == 0 else (linear.mask.float() @ sees.float()) > 0
        degrees.append(sees.sum(1))
    if not same_degrees(degrees):
        raise no_counterpart(f"{name}.hyper", module.hyper, "its hidden layers differ in width")
    weights = [(linear.weight * linear.mask, linear.bias) for linear in linears]
    of_context = weights[0][0][:, found.features :] if context else None
    weights[0] = weights[0][0][:, : found.features], weights[0][1]
    elements = module.order.argsort().cpu()
    state = masked_state(weights, degrees, elements, of_context)
    net = node(
        "nets.MADE",
        hidden=linears[0].out_features,
        depth=len(linears) - 1,
        degrees="random",
        activation=ACTIVATIONS[activation],
    )
    yield autoregressive(_univariate(name, module), net, state, elements)


def _univariate(name: str, module: nn.Module) -> dict:
    function, given = module.univariate, {}
    while isinstance(function, functools.partial):
        given, function = {**function.keywords, **given}, function.func
    options = inspect.signature(function).parameters
    values = {key: given.get(key, options[key].default) for key in ("slope", "bound") if key in options}
    if function.__name__ == "MonotonicAffineTransform" and values["slope"] == 1e-3:
        return node("bijections.ScaleShift", scale="softclip")
    if function.__name__ == "MonotonicRQSTransform":
        bins, bound = module.shapes[0][0], float(values["bound"])
        return node("bijections.SoftClippedRationalQuadratic", bins=bins, bound=bound, least=values["slope"])
    raise no_counterpart(f"{name}.univariate", module, f"{function.__name__}({values})")
