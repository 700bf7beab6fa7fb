"""Flows of normflows (Stimper et al.): ``normflows.NormalizingFlow``, whose layers run from latent to data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flowtrain.importers.layers import (
    NUMPY,
    Imported,
    Layer,
    affine,
    autoregressive,
    by_parameter,
    coupling,
    linear_layers,
    no_counterpart,
    node,
    permutation,
    triangular,
)
from flowtrain.importers.splines import masked_network, spline_autoregressive, spline_coupling

MODULES = ("normflows",)  # whose classes a pickled flow may name
PICKLED = NUMPY  # and what else it may name


def log_prob(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    return flow.log_prob(x)


def read(flow: nn.Module) -> Imported:
    """The layers of a flow, from data to latent.

    Raises:
        UsageError: a module without a counterpart, which is named.
    """
    if type(flow).__name__ != "NormalizingFlow":
        raise no_counterpart("flow", flow, "give a normflows.NormalizingFlow")
    base = flow.q0
    if type(base).__name__ != "DiagGaussian" or len(base.shape) != 1:
        raise no_counterpart("q0", base)
    found = Imported(int(base.shape[0]))
    for i, module in reversed([*enumerate(flow.flows)]):
        found.layers += _layers(f"flows.{i}", module, found.features)
    found.layers.append(affine(-base.log_scale, -base.loc * (-base.log_scale).exp()))
    return found


def _layers(name: str, module: nn.Module, features: int) -> Iterator[Layer]:
    """The inverse of ``module``."""
    kind = type(module).__name__
    if kind == "AutoregressiveRationalQuadraticSpline":
        yield spline_autoregressive(f"{name}.mprqat", module.mprqat, activates_first=False)
    elif kind == "CoupledRationalQuadraticSpline":
        yield from spline_coupling(f"{name}.prqct", module.prqct)
    elif kind == "MaskedAffineAutoregressive":
        yield _autoregressive(name, module)
    elif kind == "AffineCouplingBlock":
        yield from _coupling(name, module, features)
    elif kind == "LULinearPermute":
        yield permutation(module.permutation._permutation)
        linear = module.linear
        yield triangular(*linear._create_lower_upper())
        yield affine(torch.zeros_like(linear.bias), linear.bias)
    elif kind == "Permute":
        yield permutation(_inverse_order(module, features))
    elif kind in ("ActNorm", "AffineConstFlow"):
        yield affine(-module.s, -module.t * (-module.s).exp())
    else:
        raise no_counterpart(name, module)


def _inverse_order(module: nn.Module, features: int) -> Tensor:
    if module.mode == "shuffle":
        return module.inv_perm
    half = (features + 1) // 2
    return torch.cat((torch.arange(half, features), torch.arange(half)))


def _autoregressive(name: str, module: nn.Module) -> Layer:
    """From latent to data it is x = scale·z + shift with parameters of z, in one pass: the inverse of ours."""

    def convert(numbers: Tensor) -> Tensor:
        scale, shift = numbers.unbind(-1)
        return torch.stack((shift, scale), -1)

    net, state, elements = masked_network(name, module.autoregressive_net, convert, activates_first=False)
    return autoregressive(node("bijections.ScaleShift", scale="sigmoid"), net, state, elements, inverted=True)


def _coupling(name: str, module: nn.Module, features: int) -> Iterator[Layer]:
    """(x − t)·exp(−s) for t and s of the other half, which are the even and the odd outputs of their network."""
    split, inner, _ = module.flows
    if split.mode not in ("channel", "channel_inv"):
        raise no_counterpart(name, module, f"it splits by {split.mode}")
    if inner.scale and inner.scale_map != "exp":
        raise no_counterpart(name, module, f"its scale is {inner.scale_map}, not exp")
    half = (features + 1) // 2
    first, second = torch.arange(half), torch.arange(half, features)
    conditioning, transformed = (first, second) if split.mode == "channel" else (second, first)
    net, state, last = _network(f"{name}.param_map", inner.param_map)
    params = 2 if inner.scale else 1
    weight, bias = (-part.detach().unflatten(0, (-1, params)) for part in (last.weight, last.bias))
    univariate = node("bijections.ExpAffine", bound=60.0) if inner.scale else node("bijections.Additive")
    yield from coupling(name, module, conditioning, transformed, univariate, net, state | by_parameter(weight, bias))


def _network(name: str, module: nn.Module) -> tuple[dict, dict[str, Tensor], nn.Linear]:
    """The node of a multilayer perceptron, its state but for the last layer, and that."""
    layers = [*getattr(module, "net", [])]
    linears, activations = layers[::2], layers[1::2]
    widths = {linear.out_features for linear in linears[:-1] if isinstance(linear, nn.Linear)}
    plain = all(isinstance(layer, nn.Linear) for layer in linears) and len(layers) % 2 == 1 and len(widths) == 1
    if type(module).__name__ != "MLP" or not plain:
        raise no_counterpart(
            name, module, "only an MLP of hidden layers of one width, without output function, has one"
        )
    x = torch.tensor([-1.0, 1.0])
    if any(not torch.equal(activation(x), x.relu()) for activation in activations):
        raise no_counterpart(name, module, "its activations are not rectifiers: leaky=0.0")
    state = linear_layers("net.first", linears[0])
    for i, linear in enumerate(linears[1:-1]):
        state |= linear_layers(f"net.hidden.{i}", linear)
    return node("nets.MLP", hidden=widths.pop(), depth=len(linears) - 1), state, linears[-1]
