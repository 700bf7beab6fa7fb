"""What nflows and normflows have in common: normflows' networks and splines are copies of nflows'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowtrain.importers.layers import (
    Layer,
    autoregressive,
    by_parameter,
    convert_last,
    coupling,
    linear_layers,
    masked_state,
    no_counterpart,
    node,
    same_degrees,
    spline_parameters,
)


def masked_network(
    name: str, made: nn.Module, convert, activates_first: bool
) -> tuple[dict, dict[str, Tensor], Tensor]:
    """The node and state of a MADE of nflows or normflows, and the elements' order. ``convert`` changes the parameters
    of an element."""
    blocks = [*made.blocks]
    residual = all(type(block).__name__ == "MaskedResidualBlock" for block in blocks)
    if not residual and not activates_first:
        raise no_counterpart(name, made, "its first layer has no activation")
    if getattr(made, "context_layer", None) is not None:
        raise no_counterpart(name, made, "its blocks read a context")
    if getattr(made, "preprocessing", None) is not None and not isinstance(made.preprocessing, nn.Identity):
        raise no_counterpart(name, made, "its inputs are preprocessed")
    activation = _activation(name, made, blocks)
    inner = []
    for block in blocks:
        if getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) is not None:
            raise no_counterpart(name, block, "it has batch normalization")
        if getattr(block, "context_layer", None) is not None:
            raise no_counterpart(name, block, "it reads a context")
        inner += [*block.linear_layers] if residual else [block.linear]
    hidden = [made.initial_layer, *inner]
    degrees = [layer.degrees for layer in hidden]
    if not same_degrees(degrees) or residual and not all(torch.equal(degrees[0], one) for one in degrees):
        raise no_counterpart(name, made, "its layers have masks of different degrees")
    layers = [(layer.weight * layer.mask, layer.bias) for layer in hidden]
    features = made.initial_layer.in_features
    last = made.final_layer
    weight, bias = ((last.weight * last.mask).unflatten(0, (features, -1)), last.bias.unflatten(0, (features, -1)))
    weight, bias = convert_last(weight, bias, convert)
    layers.append((weight.flatten(0, 1), bias.flatten()))
    elements = torch.arange(features)
    state = masked_state(layers, degrees, elements, None)
    size = {"hidden": made.initial_layer.out_features, "degrees": "random", "activation": activation}
    if residual:
        return node("nets.ResidualMADE", blocks=len(blocks), **size), state, elements
    return node("nets.MADE", depth=len(hidden), **size), state, elements


def _activation(name: str, net: nn.Module, blocks: list[nn.Module]) -> str:
    """relu or tanh; by what it does, since it may be a function or a module."""
    function = getattr(net, "activation", None) or blocks[0].activation
    x = torch.linspace(-2, 2, 9)
    for known in ("relu", "tanh"):
        if torch.equal(function(x), getattr(torch, known)(x)):
            return known
    raise no_counterpart(name, net, f"its activation {getattr(function, '__name__', function)} is not relu or tanh")


def spline(name: str, module: nn.Module) -> dict:
    """The node of a spline with linear tails."""
    if module.tails != "linear":
        raise no_counterpart(name, module, f"its tails are {module.tails}, not linear")
    least = {"min_width": module.min_bin_width, "min_height": module.min_bin_height}
    least["min_derivative"] = module.min_derivative
    bins = getattr(module, "num_bins", None) or module.unnormalized_widths.shape[-1]
    return node("bijections.RationalQuadratic", bins=bins, bound=float(module.tail_bound), **least)


def spline_autoregressive(name: str, module: nn.Module, activates_first: bool) -> Layer:
    univariate, made = spline(name, module), module.autoregressive_net
    hidden = getattr(made, "hidden_features", None)

    def convert(numbers: Tensor) -> Tensor:
        return spline_parameters(numbers, module.num_bins, hidden, module.min_derivative)

    net, state, elements = masked_network(name, made, convert, activates_first)
    return autoregressive(univariate, net, state, elements)


def residual_network(name: str, net: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """The node of a coupling's residual network, and its state but for the last layer."""
    if type(net).__name__ != "ResidualNet":
        raise no_counterpart(name, net, "of the networks of couplings only ResidualNet has one")
    blocks = [*net.blocks]
    if getattr(net, "context_features", None) is not None:
        raise no_counterpart(name, net, "it reads a context")
    if getattr(net, "preprocessing", None) is not None:
        raise no_counterpart(name, net, "its inputs are preprocessed")
    if any(block.use_batch_norm for block in blocks):
        raise no_counterpart(name, net, "it has batch normalization")
    if _activation(name, net, blocks) != "relu":
        raise no_counterpart(name, net, "its activation is not relu")
    state = linear_layers("net.first", net.initial_layer)
    for i, block in enumerate(blocks):
        state |= linear_layers(f"net.ones.{i}", block.linear_layers[0])
        state |= linear_layers(f"net.others.{i}", block.linear_layers[1])
    return node("nets.ResidualMLP", hidden=net.initial_layer.out_features, blocks=len(blocks)), state


def spline_coupling(name: str, module: nn.Module):
    """The layers of a coupling of splines; the conditioning part may have splines of its own."""
    univariate, bins = spline(name, module), module.num_bins
    net, state = residual_network(f"{name}.transform_net", module.transform_net)
    conditioning, transformed = module.identity_features.cpu(), module.transform_features.cpu()
    last = module.transform_net.final_layer
    hidden = getattr(module.transform_net, "hidden_features", None)
    weight, bias = (part.unflatten(0, (len(transformed), -1)) for part in (last.weight, last.bias))
    weight, bias = convert_last(
        weight, bias, lambda numbers: spline_parameters(numbers, bins, hidden, module.min_derivative)
    )
    more, own = {}, module.unconditional_transform
    if own is not None:
        more["unconditional"] = node(
            "bijections.Elementwise", univariate=spline(f"{name}.unconditional_transform", own)
        )
        numbers = [own.unnormalized_widths, own.unnormalized_heights, own.unnormalized_derivatives]
        theta = spline_parameters(torch.cat(numbers, -1), bins, None, own.min_derivative)
        state = state | {"unconditional.theta": theta.detach()}
    state = state | by_parameter(weight.detach(), bias.detach())
    yield from coupling(name, module, conditioning, transformed, univariate, net, state, **more)
