"""Flows of nflows (Durkan et al.): ``nflows.flows.Flow``."""

from __future__ import annotations

import math
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
    no_counterpart,
    node,
    permutation,
    triangular,
)
from flowtrain.importers.splines import masked_network, residual_network, spline_autoregressive, spline_coupling

MODULES = (
    "nflows.flows",
    "nflows.transforms",
    "nflows.distributions",
    "nflows.nn.nets",
)  # whose classes a pickled flow may name
PICKLED = [*NUMPY, torch.relu, torch.tanh]  # and what else it may name
START = math.log(math.expm1(1 - 1e-3))  # where our softplus scale is 1; theirs is 1 there without the shift


def log_prob(flow: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    return flow.log_prob(x, context)


def read(flow: nn.Module) -> Imported:
    """The layers of a flow.

    Raises:
        UsageError: a module without a counterpart, which is named.
    """
    if type(flow).__name__ != "Flow" or type(flow).__module__ != "nflows.flows.base":
        raise no_counterpart("flow", flow, "give an nflows.flows.Flow")
    if type(flow._distribution).__name__ != "StandardNormal":
        raise no_counterpart("_distribution", flow._distribution)
    if not isinstance(flow._embedding_net, nn.Identity):
        raise no_counterpart("_embedding_net", flow._embedding_net)
    shape = tuple(flow._distribution._shape)
    if len(shape) != 1:
        raise no_counterpart("flow", flow, f"its data are of shape {list(shape)}, not vectors")
    return Imported(shape[0], None, [*_layers("_transform", flow._transform)])


def _layers(name: str, module: nn.Module) -> Iterator[Layer]:
    kind = type(module).__name__
    if kind == "CompositeTransform":
        for i, part in enumerate(module._transforms):
            yield from _layers(f"{name}.{i}", part)
    elif kind in ("RandomPermutation", "ReversePermutation", "Permutation") and module._dim == 1:
        yield permutation(module._permutation)
    elif kind == "LULinear":
        lower, upper = module._create_lower_upper()
        yield triangular(lower, upper)
        yield affine(torch.zeros_like(module.bias), module.bias)
    elif kind == "ActNorm":
        yield affine(module.log_scale, module.shift)
    elif kind == "BatchNorm":
        log_scale = module.weight.log() - 0.5 * (module.running_var + module.eps).log()
        yield affine(log_scale, module.bias - module.running_mean * log_scale.exp())
    elif kind == "MaskedAffineAutoregressiveTransform":
        yield autoregressive(*_softplus(name, module))
    elif kind == "MaskedPiecewiseRationalQuadraticAutoregressiveTransform":
        yield spline_autoregressive(name, module, activates_first=True)
    elif kind == "PiecewiseRationalQuadraticCouplingTransform":
        yield from spline_coupling(name, module)
    elif kind in ("AffineCouplingTransform", "AdditiveCouplingTransform"):
        yield from _coupling(name, module, kind)
    else:
        raise no_counterpart(name, module)


def _softplus(name: str, module: nn.Module) -> tuple[dict, dict, dict, Tensor]:
    """Their parameters are scale and shift, ours shift and scale."""

    def convert(numbers: Tensor) -> Tensor:
        scale, shift = numbers.unbind(-1)
        return torch.stack((shift, scale - START), -1)

    net, state, elements = masked_network(name, module.autoregressive_net, convert, activates_first=True)
    return node("bijections.ScaleShift", scale="softplus"), net, state, elements


def _coupling(name: str, module: nn.Module, kind: str) -> Iterator[Layer]:
    net, state = residual_network(f"{name}.transform_net", module.transform_net)
    if module.unconditional_transform is not None:
        raise no_counterpart(f"{name}.unconditional_transform", module.unconditional_transform)
    conditioning, transformed = module.identity_features.cpu(), module.transform_features.cpu()
    last = module.transform_net.final_layer
    params = len(last.bias) // len(transformed)
    weight, bias = (part.detach().unflatten(0, (params, -1)).transpose(0, 1) for part in (last.weight, last.bias))
    univariate = node("bijections.Additive")
    if kind == "AffineCouplingTransform":
        univariate = node("bijections.ScaleShift", scale="sigmoid")
    yield from coupling(name, module, conditioning, transformed, univariate, net, state | by_parameter(weight, bias))
