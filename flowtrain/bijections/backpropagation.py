"""Activation checkpointing and reversible backpropagation: training in less memory.

The activations of networks take most of the memory of training. Here a chain of layers is divided into segments with a
network each. Only the inputs of segments are kept, and activations are recomputed when gradients need them.
``Flow.set_backpropagation`` sets how a flow's chains do that. Without gradients, layers run as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from flowtrain.bijections.bijection import (
    Backpropagation,
    Bijection,
    Chain,
    apply_in_turn,
    fuse,
    is_sequence,
    zero_log_det,
)
from flowtrain.bijections.ode import traced_layers
from flowtrain.bijections.step import separate
from flowtrain.runtime import global_batch, modes

KEEP, RECOMPUTE, INVERT = "keep", "recompute", "invert"  # what a segment does for its gradient


class ActivationCheckpointing(Backpropagation):
    """Keeps the input of each segment and runs the segment again, bit for bit, for its gradient (Chen et al. 2016).

    Activations are kept in surjections, in ODEs, whose solver can save memory by itself (``adjoint``), in residual
    layers, which always do, and in layers that hold divided chains, such as a multi-scale layer.
    """

    def __init__(self) -> None:
        self.divided: dict[Chain, list[tuple[str, list[Bijection]]]] = {}

    def chains(self, bijection):
        return list(_chains_to_divide(bijection))

    def run(self, chain, x, context):
        if not torch.is_grad_enabled():
            return super().run(chain, x, context)
        if chain not in self.divided:
            self.divided[chain] = list(self.segments(chain))
        total = zero_log_det(x)
        for kind, layers in self.divided[chain]:
            x, total = self.run_segment(kind, layers, x, context, total)
        return x, total

    def run_segment(self, kind: str, layers: list[Bijection], x: Tensor, context: Tensor | None, total: Tensor):
        """x through a segment, and the sum of its log-determinants added to ``total``."""
        if kind == KEEP:
            return _run(layers, x, context, total)
        return checkpoint(_run, layers, x, context, total, use_reentrant=False, context_fn=_checkpoint_contexts)

    def kind(self, layer: Bijection) -> str:
        """What a segment with ``layer`` in it does for its gradient."""
        keep = not layer.exact or traced_layers(layer) or any(_chains_to_divide(layer))
        return KEEP if keep else RECOMPUTE

    def networks_per_segment(self, kind: str) -> int:
        return 1

    def segments(self, chain: Chain) -> Iterator[tuple[str, list[Bijection]]]:
        """The layers in order, in segments of one kind; a segment ends with the last of its networks."""
        segment: list[Bijection] = []
        kind, networks = KEEP, 0
        for layer in self.layers(chain):
            if segment and (kind != self.kind(layer) or networks >= self.networks_per_segment(kind)):
                yield kind, segment
                segment, networks = [], 0
            segment.append(layer)
            kind, networks = self.kind(layer), networks + _count_networks(layer)
        yield kind, segment

    def layers(self, chain: Chain) -> Iterable[Bijection]:
        return chain


class ReversibleBackpropagation(ActivationCheckpointing):
    """Keeps the input of every few networks, and finds what lies between by the layers' inverses (Gomez et al. 2017).

    A coupling layer needs one evaluation of its network for both its inverse and its gradient. A rounding may switch a
    rectifier on or off and so change a gradient by more than a rounding. So the inputs of networks are restored to the
    last bit: the two lower bytes of each number are kept, and the inverse finds the others, unless the number is below
    2⁻¹⁵ of the numbers from which it is computed. Other inputs drift by roundings until the next kept one, where the
    recomputed and the kept one are compared. Layers that are not ``reversible`` are run again from their kept input, as
    in :class:`ActivationCheckpointing`.

    Args:
        spacing: networks from one kept input to the next.
        bound: of the error, |recomputed − kept|/|kept|, beyond which :meth:`statistics` raises.
    """

    def __init__(self, spacing: int = 8, bound: float = 1e-4):
        super().__init__()
        self.spacing, self.bound = spacing, bound
        self.error: Tensor | None = None  # the greatest since the last call of statistics, on the device

    def chains(self, bijection):
        if global_batch.has_moments(bijection):
            raise ValueError(
                "memory=reversible: batch normalization cannot be run backwards, for the moments of a batch are not "
                "known before it is; use memory=checkpoint or another norm"
            )
        return super().chains(bijection)

    def run_segment(self, kind, layers, x, context, total):
        if kind != INVERT:
            return super().run_segment(kind, layers, x, context, total)
        links = [*separate(fuse(_flatten(layers)))]
        trained = [[parameter for parameter in link.parameters() if parameter.requires_grad] for link in links]
        x, log_det = _InvertedSegment.apply(links, trained, self.compare, x, context, *chain.from_iterable(trained))
        return x, total + log_det

    def layers(self, chain):
        """With the layers of divided chains in place of those, so that segments are as long as they may be."""
        for layer in chain:
            if is_sequence(layer) and layer.backpropagation is self:
                yield from self.layers(layer)
            else:
                yield layer

    def kind(self, layer):
        kind = super().kind(layer)
        return INVERT if kind == RECOMPUTE and layer.reversible else kind

    def networks_per_segment(self, kind):
        return self.spacing if kind == INVERT else 1

    def compare(self, recomputed: Tensor, kept: Tensor, output: Tensor) -> None:
        """Note the error of a segment's recomputed input, unless its ``output`` was not finite."""
        norm = torch.linalg.vector_norm
        error = norm(recomputed - kept) / norm(kept).clamp(min=torch.finfo(kept.dtype).tiny)
        error = torch.where((norm(kept) + norm(output)).isfinite(), error, 0)
        self.error = error if self.error is None else torch.maximum(self.error, error)

    def statistics(self):
        """The greatest error since the last call, of all processes, each of which calls this at the same step.

        Raises:
            FloatingPointError: it exceeds the bound.
        """
        if self.error is None:
            return {}
        error, self.error = self.error, None
        if dist.is_initialized():
            dist.all_reduce(error, dist.ReduceOp.MAX)
        if not (value := error.item()) <= self.bound:
            raise FloatingPointError(
                f"memory=reversible: the layers' inverses recompute inputs with an error of {value:.2g}, above its "
                f"bound of {self.bound:g}, and gradients err by as much or more; memory=checkpoint has no such error"
            )
        return {"memory/reconstruction_error": value}


MEMORY_MODES: dict[str, type[Backpropagation]] = {
    "none": Backpropagation,
    "checkpoint": ActivationCheckpointing,
    "reversible": ReversibleBackpropagation,
}


class _InvertedSegment(torch.autograd.Function):
    """Layers in turn. Kept are their input, their output, and the lower bits of their exact inputs."""

    @staticmethod
    def forward(ctx, links, trained, compare, x, context, *parameters):
        ctx.links, ctx.trained, ctx.compare, ctx.random = links, trained, compare, []
        # the gradient of a layer's parameters is found from that layer alone
        ctx.modes = replace(modes.current(), affines=None, log_dets=None)
        ctx.autocast = _current_autocast(x.device.type)
        lower = []

        def run(link, x, context):
            ctx.random.append((torch.get_rng_state(), get_device_states(x)))
            lower.append([_lower_bits(part) for part in link.exact_inputs(x)])
            with (
                torch.enable_grad()
            ):  # the graph is dropped at once, but some kernels differ in the last bit without it
                z, log_det = link(x, context)
            return z.detach(), log_det.detach()

        with ctx.autocast():
            z, log_det = apply_in_turn([partial(run, link) for link in links], x.detach(), context)
        ctx.counts = [len(bits) for bits in lower]
        ctx.save_for_backward(x, z, context, *chain.from_iterable(lower))
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, log_det_gradient):
        kept, output, context, *lower = ctx.saved_tensors
        wants_context, context_gradients, parameter_gradients = ctx.needs_input_grad[4], [], []
        x, device = output, output.device.type
        with torch.random.fork_rng(get_device_states(x)[0], device_type=device), modes.repeat(ctx.modes):
            for link, trained, count, random in reversed([*zip(ctx.links, ctx.trained, ctx.counts, ctx.random)]):
                torch.set_rng_state(random[0])
                set_device_states(*random[1], device_type=device)
                source = context if not wants_context else context.detach().requires_grad_()
                with torch.enable_grad(), ctx.autocast():
                    x, leaf, z, log_det = link.recompute(x, source, _restorer(lower[len(lower) - count :]))
                del lower[len(lower) - count :]
                pairs = [pair for pair in ((z, gradient), (log_det, log_det_gradient)) if pair[0].requires_grad]
                outputs, output_gradients = zip(*pairs)
                inputs = [leaf, *trained, *([source] if wants_context else [])]
                gradient, *others = torch.autograd.grad(outputs, inputs, output_gradients, allow_unused=True)
                if wants_context and (one := others.pop()) is not None:
                    context_gradients.append(one)
                parameter_gradients = others + parameter_gradients
        ctx.compare(x, kept, output)
        context_gradient = sum(context_gradients) if context_gradients else None
        return None, None, None, gradient, context_gradient, *parameter_gradients


def _restorer(bits: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that makes one tensor after the other exact, while there are lower ``bits`` of them."""
    left = iter(bits)

    def restore(x):
        kept = next(left, None)
        return x if kept is None else _nearest(x, kept)

    return restore


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _lower_bits(x: Tensor) -> Tensor:
    """The two lower bytes of each number: in float32 half of them."""
    return x.view(_INTEGERS[x.dtype]).to(torch.int16)


def _nearest(x: Tensor, bits: Tensor) -> Tensor:
    """The numbers nearest to x with these lower bits: the original ones, if x is within 2¹⁵ roundings of them."""
    number = x.view(_INTEGERS[x.dtype])
    return (number + (bits - number.to(torch.int16))).view(x.dtype)  # a difference of two bytes, modulo 2¹⁶


def _run(layers: list[Bijection], x: Tensor, context: Tensor | None, total: Tensor) -> tuple[Tensor, Tensor]:
    return apply_in_turn(fuse(layers), x, context, total)


def _checkpoint_contexts():
    """For the first run of a checkpointed segment, and for the second."""
    return nullcontext(), modes.repeat(modes.current())


def _current_autocast(device: str) -> partial:
    """Autocast as it is now, without its cache: a weight cast there without gradients would have none later."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype, enabled, cache_enabled=False)


def _flatten(layers: Iterable[Bijection]) -> Iterator[Bijection]:
    """The layers, with those of each chain in its place."""
    for layer in layers:
        yield from _flatten(layer.layers().values()) if is_sequence(layer) else [layer]


def _count_networks(layer: Bijection) -> int:
    """The number of layers with a network in ``layer``. A network is a module of modules. An actnorm or a univariate
    map is none and needs little memory."""
    if layer.container:
        return sum(map(_count_networks, layer.layers().values()))
    return any(True for child in layer.children() for _ in child.children())


def _chains_to_divide(bijection: Bijection) -> Iterator[Chain]:
    """The chains in ``bijection`` with more than one network, but for those run backwards or compiled as a whole."""
    if bijection.inverts_layers or bijection._compiled_call_impl is not None:
        return
    if isinstance(bijection, Chain) and _count_networks(bijection) > 1:
        yield bijection
    for layer in bijection.layers().values():
        yield from _chains_to_divide(layer)
