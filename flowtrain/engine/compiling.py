"""``torch.compile`` by regions: what a flow repeats is compiled once and serves all its repetitions.

A flow as a whole takes minutes to compile, and longer with every step it has. Its steps of one shape are one program,
so that the time depends on how many different steps there are and not on their number.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flowtrain.bijections import Autoregressive, Bijection, Chain, Coupling
from flowtrain.bijections.autoregressive import sequential_layers
from flowtrain.bijections.ode import continuous_layers
from flowtrain.errors import UsageError
from flowtrain.flow import Flow

log = logging.getLogger("flowtrain")


class Compiled:
    """What :func:`compile_flow` did, and what it has taken so far.

    Regions are compiled when they first run forward and backward. From :meth:`settle` on, after a whole training step,
    nothing more is due. What the process compiles beside this flow counts too.

    Attributes:
        regions: modules that run compiled.
        shapes: how many different ones there are among them. Each is compiled once, and once more where the first of a
            level gets an input that needs no gradient or lies in memory otherwise.
        graphs: programs compiled up to :meth:`settle`.
        seconds: spent on them, forward and backward.
        recompiles: programs compiled since :meth:`settle`.
    """

    def __init__(self, regions: list[nn.Module]):
        from torch._dynamo.callback import callback_handler

        self.regions, self.shapes = len(regions), len({signature(region) for region in regions})
        self.graphs, self.seconds, self.recompiles = 0, 0.0, 0
        self._settled, self._warned, self._since = False, 0, 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def _start(self, args) -> None:
        self._since = time.monotonic()
        if args.callback_trigger.name == "DYNAMO":  # a forward, not the backward of one
            self.graphs += not self._settled
            self.recompiles += self._settled

    def _end(self, _args) -> None:
        if not self._settled:
            self.seconds += time.monotonic() - self._since

    def settle(self) -> None:
        """All there is to compile has been: what follows is a recompilation."""
        self._settled = True

    def after_step(self, step: int) -> None:
        """To be called after each training step: the first tells what compiling took, a later one if it goes on."""
        if not self._settled:
            self.settle()
            counts = self.regions, self.shapes, self.graphs, self.seconds
            log.info("compiled: %d layers (%d different) as %d graphs, in %.0f s", *counts)
        elif self.recompiles > self._warned:
            self._warned = self.recompiles
            log.warning("step %d: compiled again, %d graphs since the first step", step, self.recompiles)

    def eagerly(self) -> AbstractContextManager:
        """Within it, nothing runs compiled: batches of other sizes, without gradients, would each be compiled anew."""
        return torch.compiler.set_stance("force_eager")


def pays(device: torch.device, max_steps: int | None, max_minutes: float | None) -> bool:
    """Whether ``compile=auto`` compiles: on a GPU, in a run of at least 5000 steps, or of 20 minutes if only those are
    set. It takes minutes, and a step of a CPU gains little: most of its time goes into the products of matrices."""
    long = max_steps >= 5000 if max_steps else (max_minutes or 0) >= 20
    return device.type == "cuda" and long


def compile_flow(flow: Flow) -> Compiled:
    """Compile the training direction of ``flow`` in place, region by region; names in its state dict stay.

    To be called once the flow is initialized, and after a copy of it, such as EMA's, has been made. Batches should all
    have one size.

    Raises:
        UsageError: nothing in the flow can be compiled, or this machine lacks what compiling needs.
    """
    _share_classes(flow)
    found = list(regions(flow.bijection))
    if not found:
        raise UsageError("compile=true: nothing in this flow can be compiled; use compile=false")
    _try(found[0])
    compiled = Compiled(found)
    # torch counts all regions together; see Compiled.shapes for the other two
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 3 * compiled.shapes)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # of itself to itself
    for region in found:
        region.compile(fullgraph=True, dynamic=False)
    return compiled


def regions(bijection: Bijection) -> Iterator[Bijection]:
    """What is compiled as one: each layer that a Chain repeats; elsewhere each coupling or autoregressive layer.

    Never a layer that solves an ODE, whose steps depend on values, nor one that goes through the elements one by one.
    """
    if bijection.inverts_layers:  # their forward is not called
        return
    whole = not continuous_layers(bijection) and not sequential_layers(bijection)
    if whole and isinstance(bijection, Coupling | Autoregressive):
        yield bijection
    elif whole and isinstance(bijection, Chain) and _repeats(bijection):
        yield from bijection
    else:
        for layer in bijection.layers().values():
            yield from regions(layer)


def _repeats(chain: Chain) -> bool:
    return len(list(chain)) > 1 and len({signature(layer) for layer in chain}) == 1


def _share_classes(module: nn.Module) -> None:
    """One class for modules that differ in their weights alone: torch gives each that has a parametrization, such as
    weight normalization, a class of its own, which no two would share a program with."""
    classes: dict = {}
    for part in module.modules():
        if is_parametrized(part):
            kind = type(part).__bases__, tuple(part.parametrizations)
            part.__class__ = classes.setdefault(kind, type(part))


def signature(module: nn.Module) -> tuple:
    """Equal for modules that are one program: the same classes, sizes and settings, whatever the weights."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return (
        type(module),
        *((name, repr(value)) for name, value in plain.items() if name != "init_arguments"),
        *((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors),
        *((name, signature(child)) for name, child in module.named_children()),
    )


_PLAIN = bool | int | float | str | tuple | list | None


def _try(region: nn.Module) -> None:
    """UsageError where torch.compile cannot work at all: no compiler for the region's device, or one that fails."""

    def square(x: Tensor) -> Tensor:
        return (x * x).sum()

    device = next(region.parameters()).device
    try:
        torch.compile(square, fullgraph=True)(torch.ones(4, device=device, requires_grad=True)).backward()
    except Exception as error:  # of many kinds
        raise unavailable(error) from error


def unavailable(error: Exception) -> UsageError:
    """What a failed compilation says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join([f"{type(error).__name__}:", *lines[:2]])  # of a compiler's error, the first names the backend
    return UsageError(f"compile=true: torch.compile does not work here ({reason}); use compile=false")


@contextmanager
def explained():
    """Within it, what torch.compile cannot do is UsageError."""
    try:
        yield
    except Exception as error:
        if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
            raise unavailable(error) from error
        raise
