"""What chains keep of their layers' work while they train, and how they find the rest again for the gradient.

The activations of networks are most of what a flow keeps. So its chains are divided into parts with a network each, and
only what passes from part to part is kept. ``Flow.keep`` gives a memory to the chains of a flow. Without gradients
nothing is kept anyway, and layers run as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from flowtrain.bijections.bijection import Bijection, Chain, Inverse, Memory, joined, through, zero_log_det
from flowtrain.bijections.ode import continuous_layers
from flowtrain.runtime import globalbatch


class Checkpoint(Memory):
    """Keeps the input of each part, and runs the part once more, bit for bit, when its gradient is due.

    What runs plainly: surjections, ODEs, whose solver has a way of its own to save memory (``adjoint``), and what holds
    divided chains, such as a multi-scale layer.
    """

    def __init__(self):
        self.divided: dict[Chain, list[tuple[str, list[Bijection]]]] = {}

    def chains(self, flow):
        return list(_divided(flow))

    def run(self, chain, x, context):
        if not torch.is_grad_enabled():
            return super().run(chain, x, context)
        if chain not in self.divided:
            self.divided[chain] = list(self.parts(chain))
        total = zero_log_det(x)
        for way, layers in self.divided[chain]:
            x, total = self.take(way, layers, x, context, total)
        return x, total

    def take(self, way: str, layers: list[Bijection], x: Tensor, context: Tensor | None, total: Tensor):
        """x and the sum of log-determinants through a part, in the way that its gradient needs."""
        if way == "plain":
            return _run(layers, x, context, total)
        return checkpoint(_run, layers, x, context, total, use_reentrant=False, context_fn=_contexts)

    def way(self, layer: Bijection) -> str:
        """ "plain", or "repeated" from its input."""
        return "repeated" if layer.exact and not continuous_layers(layer) and not any(_divided(layer)) else "plain"

    def length(self, way: str) -> int:
        """Networks in a part."""
        return 1

    def parts(self, chain: Chain) -> Iterator[tuple[str, list[Bijection]]]:
        """The layers in order, each part with its way; a part ends with the last of its networks."""
        part, way, networks = [], None, 0
        for layer in self.layers(chain):
            if part and (way != self.way(layer) or networks >= self.length(way)):
                yield way, part
                part, networks = [], 0
            part.append(layer)
            way, networks = self.way(layer), networks + _networks(layer)
        yield way, part

    def layers(self, chain: Chain) -> Iterable[Bijection]:
        return chain


class Reversible(Checkpoint):
    """Keeps the input of every few networks, an anchor, and recomputes what lies between by the layers' inverses.

    A coupling takes one evaluation of its network for that and for its gradient. A rounding may turn a rectifier on or
    off, and so the gradient into another. So networks get back what they saw to the last bit: two bytes of each of its
    numbers are kept, and the inverse finds the others. What a network does not see drifts by roundings from one anchor
    to the one before, where what was recomputed is compared with what was kept. Layers without a cheap inverse
    (``reversible = False``) are repeated from their input, as :class:`Checkpoint` does.

    Args:
        spacing: networks from one anchor to the next.
        bound: of the error, |recomputed − kept|/|kept|, that :meth:`statistics` lets pass.
    """

    def __init__(self, spacing: int = 8, bound: float = 1e-4):
        super().__init__()
        self.spacing, self.bound = spacing, bound
        self.error: Tensor | None = None  # the greatest since statistics were asked for, on the device

    def chains(self, flow):
        if globalbatch.has_moments(flow):
            raise ValueError(
                "memory=reversible: batch normalization cannot be run backwards, for the moments of a batch are not "
                "known before it is; use memory=checkpoint or another norm"
            )
        return super().chains(flow)

    def take(self, way, layers, x, context, total):
        if way != "reversed":
            return super().take(way, layers, x, context, total)
        links = joined(_single(layers))
        trained = [[parameter for parameter in link.parameters() if parameter.requires_grad] for link in links]
        x, log_det = _Reversed.apply(links, trained, self.compare, x, context, *chain.from_iterable(trained))
        return x, total + log_det

    def layers(self, chain):
        """Those of the divided chains in it too, so that anchors are as far apart as they may be."""
        for layer in chain:
            if isinstance(layer, Chain) and layer.memory is self:
                yield from self.layers(layer)
            else:
                yield layer

    def way(self, layer):
        way = super().way(layer)
        return "reversed" if way == "repeated" and layer.reversible else way

    def length(self, way):
        return self.spacing if way == "reversed" else 1

    def compare(self, recomputed: Tensor, kept: Tensor, output: Tensor) -> None:
        """What a part found as its input, and what it was. Where its ``output`` was not finite that says nothing."""
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


MEMORIES = {"none": Memory, "checkpoint": Checkpoint, "reversible": Reversible}


class _Reversed(torch.autograd.Function):
    """Layers one after the other, of which input and output are kept, and the lower bits of what networks see."""

    @staticmethod
    def forward(ctx, links, trained, compare, x, context, *parameters):
        ctx.links, ctx.trained, ctx.compare, ctx.random = links, trained, compare, []
        ctx.again, ctx.autocast = globalbatch.repeater(), _autocast(x.device.type)
        lower = []

        def link_by_link(link, x, context):
            ctx.random.append((torch.get_rng_state(), get_device_states(x)))
            lower.append([_lower_bits(clue) for clue in link.clues(x)])
            with torch.enable_grad():  # let go at once, but there are kernels that differ in the last bit without
                z, log_det = link(x, context)
            return z.detach(), log_det.detach()

        with ctx.autocast():
            z, log_det = through([partial(link_by_link, link) for link in links], x.detach(), context)
        ctx.counts = [len(bits) for bits in lower]
        ctx.save_for_backward(x, z, context, *chain.from_iterable(lower))
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, of_log_det):
        kept, output, context, *lower = ctx.saved_tensors
        wants_context, of_context, of_parameters = ctx.needs_input_grad[4], [], []
        x, kind = output, output.device.type
        with torch.random.fork_rng(get_device_states(x)[0], device_type=kind), ctx.again():
            for link, trained, count, random in reversed([*zip(ctx.links, ctx.trained, ctx.counts, ctx.random)]):
                torch.set_rng_state(random[0])
                set_device_states(*random[1], device_type=kind)
                given = context if not wants_context else context.detach().requires_grad_()
                with torch.enable_grad(), ctx.autocast():
                    x, leaf, z, log_det = link.retrace(x, given, _mender(lower[len(lower) - count :]))
                del lower[len(lower) - count :]
                ends, pulls = zip(*[pair for pair in ((z, gradient), (log_det, of_log_det)) if pair[0].requires_grad])
                starts = [leaf, *trained, *([given] if wants_context else [])]
                gradient, *others = torch.autograd.grad(ends, starts, pulls, allow_unused=True)
                if wants_context and (one := others.pop()) is not None:
                    of_context.append(one)
                of_parameters = others + of_parameters
        ctx.compare(x, kept, output)
        return None, None, None, gradient, sum(of_context) if of_context else None, *of_parameters


def _mender(bits: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """What makes one number after the other exact, as long as there are ``bits`` kept of them."""
    left = iter(bits)

    def mend(x):
        kept = next(left, None)
        return x if kept is None else _nearest(x, kept)

    return mend


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _lower_bits(x: Tensor) -> Tensor:
    """Two bytes of each number: its lower half in float32."""
    return x.view(_INTEGERS[x.dtype]).to(torch.int16)


def _nearest(x: Tensor, bits: Tensor) -> Tensor:
    """The numbers nearest to x with these lower bits: those that had them, where x is within 2¹⁵ roundings of them."""
    number = x.view(_INTEGERS[x.dtype])
    return (number + (bits - number.to(torch.int16))).view(x.dtype)  # a difference of two bytes, modulo 2¹⁶


def _run(layers: list[Bijection], x: Tensor, context: Tensor | None, total: Tensor) -> tuple[Tensor, Tensor]:
    return through(joined(layers), x, context, total)


def _contexts():
    """Of a part that is repeated: for its first run, and for the second."""
    return nullcontext(), globalbatch.repeater()()


def _autocast(device: str) -> partial:
    """Autocast as it is now, but for its cache: a weight cast there without gradients would have none later."""
    now = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    return partial(torch.autocast, device, **now, cache_enabled=False)


def _single(layers: Iterable[Bijection]) -> Iterator[Bijection]:
    """The layers, in place of each chain its own."""
    for layer in layers:
        yield from _single(layer) if isinstance(layer, Chain) else [layer]


def _networks(layer: Bijection) -> int:
    """How many layers with networks there are in a layer. A network is a module of modules; an actnorm or a univariate
    map has none, and little to keep."""
    if isinstance(layer, Chain):
        return sum(map(_networks, layer))
    return any(True for child in layer.children() for _ in child.children())


def _divided(module: nn.Module) -> Iterator[Chain]:
    """The chains in ``module`` that have more than one network, but for those run backwards or compiled as a whole."""
    if isinstance(module, Inverse) or module._compiled_call_impl is not None:
        return
    if isinstance(module, Chain):
        if _networks(module) > 1:
            yield module
    for child in module.children():
        yield from _divided(child)
