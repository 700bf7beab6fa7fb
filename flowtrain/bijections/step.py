"""A step of flow as one function: affine maps of the channels, then Glow's coupling, with a gradient written by hand.

Autograd would keep about twice as many tensors, and launch three times as many operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtrain.bijections.bijection import Bijection, sum_event
from flowtrain.bijections.coupling import Alternate, Coupling, Halves, Partition
from flowtrain.bijections.univariate import SigmoidAffine
from flowtrain.runtime import fusion, gradients
from flowtrain.runtime.global_batch import dropout_mask


class FusedStep:
    """``first``, affine maps of the channels, and the coupling after it."""

    def __init__(self, first, coupling: Coupling):
        self.links = first, coupling

    def __call__(self, x, context=None):
        first, coupling = self.links
        convolutions = coupling.net.convolutions() if gradients.by_hand(x.device) and coupling.training else None
        if convolutions is None:
            x, log_det = first(x, context)
            z, coupling_log_det = coupling(x, context)
            return z, log_det + coupling_log_det
        weight, bias, log_det = first.affine(x)
        plan = _Plan(coupling, [(factor, weight.shape[-1] // 2) for weight, *_, factor in convolutions])
        tensors = [tensor for weight, bias, log_scale, _ in convolutions for tensor in (weight, bias, log_scale)]
        z, coupling_log_det = _Step.apply(plan, x, weight, bias, *tensors)
        return z, coupling_log_det + log_det.to(coupling_log_det.dtype)

    def inverse(self, z, context=None):
        first, coupling = self.links
        z, coupling_log_det = coupling.inverse(z, context)
        x, log_det = first.inverse(z, context)
        return x, log_det + coupling_log_det

    def fuse(self, following: Bijection) -> None:
        return None


def separate(links: Iterable) -> Iterator:
    """The links, with the two parts of each :class:`FusedStep` in its place."""
    for link in links:
        yield from link.links if isinstance(link, FusedStep) else [link]


def may_end_step(layer: Bijection) -> TypeGuard[Coupling]:
    """Whether ``layer`` is a coupling of :class:`FusedStep`."""
    return (
        isinstance(layer, Coupling)
        and type(layer).forward is Coupling.forward
        and type(layer).inverse is Coupling.inverse
        and type(layer.univariate) is SigmoidAffine
        and type(layer.partition) in (Halves, Alternate)
        and hasattr(layer.net, "convolutions")
        and layer.unconditional is None
        and layer._compiled_call_impl is None
        and fusion.may_fuse(layer, layer.partition, layer.univariate)
    )


class _Plan:
    """What a step does besides its tensors."""

    def __init__(self, coupling: Coupling, convolutions: list[tuple[float, int]]):
        self.partition: Partition = coupling.partition
        self.floor: float = coupling.univariate.floor  # type: ignore[assignment]
        self.convolutions = convolutions  # of each: the factor of its log-scale, and its padding
        self.dropout: float = coupling.net.dropout.p  # type: ignore[assignment, union-attr]


class _Step(torch.autograd.Function):
    """z and the coupling's log-determinant of x, W, b, and the weight, bias and log-scale of each convolution."""

    @staticmethod
    def forward(ctx, plan, x, weight, bias, *tensors):
        z = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        conditioning, transformed = plan.partition.split(z)
        # as the network by itself does it, to the bit: else a rectifier may differ between the modes of memory
        h, kept, masks = _convolve(plan, conditioning.contiguous(memory_format=torch.channels_last), tensors)
        t, raw = h.chunk(2, 1)
        scale = (raw + 2).sigmoid_().mul_(1 - plan.floor).add_(plan.floor)
        transformed.add_(t).mul_(scale)  # in its place: the conditioning part need not be copied
        ctx.plan, ctx.masks = plan, len(masks)
        ctx.save_for_backward(x, z, scale, *kept, *masks, weight, bias, *tensors)
        ctx.set_materialize_grads(False)
        return z, sum_event(scale.log())

    @staticmethod
    def backward(ctx, gradient, log_det_gradient):
        plan, count = ctx.plan, len(ctx.plan.convolutions) - 1
        x, z, scale, *others = ctx.saved_tensors
        kept, masks, (weight, bias, *tensors) = (
            others[:count],
            others[count : count + ctx.masks],
            others[count + ctx.masks :],
        )
        given = gradient, log_det_gradient
        if not gradients.in_place(*given):
            return None, *_differentiate(plan, masks, (x, weight, bias, *tensors), given)
        gradient = torch.zeros_like(z) if gradient is None else gradient
        (conditioning, transformed), (of_conditioning, of_transformed) = map(plan.partition.split, (z, gradient))
        of_h = _like(z, 2 * transformed.shape[1])
        of_t, of_raw = of_h.chunk(2, 1)
        torch.mul(of_transformed, scale, out=of_t)
        torch.mul(of_transformed, transformed, out=of_raw)
        if log_det_gradient is not None:
            of_raw.add_(log_det_gradient.view(-1, *[1] * (z.dim() - 1)))
        factor = 1 / (1 - plan.floor)  # of ∂ log(scale)/∂ raw
        of_raw.mul_(torch.rsub(scale, factor, alpha=factor).mul_(scale - plan.floor).div_(scale))
        of_y = _like(z, z.shape[1])
        first, second = plan.partition.split(of_y)
        second.copy_(of_t)
        of_network, of_tensors = _convolve_backward(plan, of_h, conditioning, kept, masks, tensors)
        torch.add(of_conditioning, of_network, out=first)
        rows = of_y.movedim(1, -1).flatten(0, -2)
        of_x = rows.mm(weight).view(z.shape[0], *z.shape[2:], -1).movedim(-1, 1) if ctx.needs_input_grad[1] else None
        of_weight = rows.T.mm(x.movedim(1, -1).reshape(rows.shape))
        return None, of_x, of_weight, None if bias is None else rows.sum(0), *of_tensors


def _like(z: Tensor, channels: int) -> Tensor:
    """A tensor for so many channels, which lie last."""
    return z.new_empty(z.shape[0], *z.shape[2:], channels).movedim(-1, 1)


def _convolve(plan: _Plan, x: Tensor, tensors) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The network's output, the rectified inputs of its convolutions after the first, and the masks of dropout."""
    kept: list[Tensor] = []
    masks: list[Tensor] = []
    for weight, bias, scale, padding, last in _layers(plan, tensors):
        if scale is None or last:
            h = F.conv2d(x, weight, bias, padding=padding)
        else:  # in the few weights, not in a pass over the many outputs
            h = F.conv2d(x, weight * scale.view(-1, 1, 1, 1), bias * scale, padding=padding)
        if not last:
            if plan.dropout:
                masks.append(dropout_mask(h, plan.dropout))
                h.mul_(masks[-1])
            kept.append(x := F.relu_(h))
    return h if scale is None else h.mul_(scale.view(-1, 1, 1)), kept, masks


def _convolve_backward(plan: _Plan, gradient: Tensor, x: Tensor, kept, masks, tensors) -> tuple[Tensor, list]:
    """The gradients of x and of ``tensors``, given that of the output, which is overwritten."""
    found: list[Tensor | None] = []
    inputs = [x, *kept]
    for i, (weight, bias, scale, padding, last) in reversed([*enumerate(_layers(plan, tensors))]):
        folded = None if last else scale
        if scale is not None and last:
            gradient.mul_(scale.view(-1, 1, 1))
        gradient, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            inputs[i],
            weight if folded is None else weight * folded.view(-1, 1, 1, 1),
            [len(weight)],
            [1, 1],
            [padding, padding],
            [1, 1],
            False,
            [0, 0],
            1,
            (True, True, True),
        )
        of_scale = None
        if scale is not None:
            if folded is not None:
                of_weight.mul_(scale.view(-1, 1, 1, 1))
                of_bias.mul_(scale)
            of_scale = (of_weight * weight).sum((1, 2, 3)).addcmul_(of_bias, bias).mul_(plan.convolutions[i][0])
            of_scale = of_scale.view(tensors[3 * i + 2].shape)
        found[:0] = of_weight, of_bias, of_scale
        if i:
            torch.ops.aten.threshold_backward.grad_input(gradient, inputs[i], 0, grad_input=gradient)
            if masks:
                gradient.mul_(masks[i - 1])
    return gradient, found


def _layers(plan: _Plan, tensors) -> Iterator[tuple[Tensor, Tensor, Tensor | None, int, bool]]:
    """Of each convolution: weight, bias, the scale of its outputs (C,), padding, and whether it is the last."""
    for i, (factor, padding) in enumerate(plan.convolutions):
        weight, bias, log_scale = tensors[3 * i : 3 * i + 3]
        scale = None
        if log_scale is not None:
            scale = (log_scale if factor == 1 else factor * log_scale).exp().flatten()
        yield weight, bias, scale, padding, i == len(plan.convolutions) - 1


def _differentiate(plan: _Plan, masks, inputs, given) -> list[Tensor | None]:
    """The gradients of ``inputs`` by autograd, which can differentiate them again."""
    with torch.enable_grad():
        inputs = [one if one is None else one.view_as(one) for one in inputs]  # of which none depends on another
        outputs = _plain(plan, masks, *inputs)
    ends, starts = zip(*(pair for pair in zip(outputs, given) if pair[1] is not None))
    wanted = [one for one in inputs if one is not None and one.requires_grad]
    found = iter(torch.autograd.grad(ends, wanted, starts, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if one is not None and one.requires_grad else None for one in inputs]


def _plain(plan: _Plan, masks, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors) -> tuple[Tensor, Tensor]:
    """What the step computes, in operations that autograd knows."""
    x = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
    conditioning, transformed = plan.partition.split(x)
    h, left = conditioning, iter(masks)
    for weight, bias, scale, padding, last in _layers(plan, tensors):
        h = F.conv2d(h, weight, bias, padding=padding)
        h = h if scale is None else h * scale.view(-1, 1, 1)
        if not last:
            h = F.relu(h * next(left) if masks else h)
    t, raw = h.chunk(2, 1)
    scale = plan.floor + (1 - plan.floor) * torch.sigmoid(raw + 2)
    return plan.partition.merge(conditioning, (transformed + t) * scale), sum_event(scale.log())
