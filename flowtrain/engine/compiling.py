"""``torch.compile`` of the training direction: a flow as a whole, or region by region.

One program for the whole flow is the fastest, and takes longer to compile with every layer. So a deep flow is compiled
by regions: what it repeats is compiled once and serves all its repetitions.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flowtrain.bijections import Autoregressive, Bijection, Chain, Coupling
from flowtrain.bijections.autoregressive import sequential_layers
from flowtrain.bijections.ode import traced_layers
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow

log = logging.getLogger("flowtrain")

DEEP = 24  # a flow of more regions is compiled by regions


class Compilation:
    """What :func:`compile_flow` did, and how long that has taken so far.

    Modules are compiled when they first run forward and backward. After a whole training step, at :meth:`settle`, all
    are. What the process compiles besides this flow counts too.

    Attributes:
        modules: that run compiled: the flow, or regions of it.
        regions: number of them.
        shapes: number of different ones among them. Each is compiled once, and once more where the first of a scale
            gets an input that needs no gradient or has another memory layout.
        graphs: programs compiled up to :meth:`settle`.
        seconds: spent on them, forward and backward.
        recompiles: programs compiled since :meth:`settle`.
    """

    def __init__(self, modules: list[nn.Module]):
        from torch._dynamo.callback import callback_handler

        self.modules = modules
        self.regions, self.shapes = len(modules), len({signature(module) for module in modules})
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
        """Count what is compiled from now on as recompilation."""
        self._settled = True

    def after_step(self, step: int) -> None:
        """To be called after each training step: logs what compiling took, and later recompilations."""
        if not self._settled:
            self.settle()
            layers = f"{self.regions} layers ({self.shapes} different)"
            what = "the whole flow" if isinstance(self.modules[0], Flow) else layers
            log.info("compiled: %s as %d graph%s, in %.0f s", what, self.graphs, "s"[: self.graphs > 1], self.seconds)
        elif self.recompiles > self._warned:
            self._warned = self.recompiles
            log.warning("step %d: compiled again, %d graphs since the first step", step, self.recompiles)

    def pause(self) -> AbstractContextManager:
        """Within it nothing runs compiled: batches of other sizes, without gradients, would each be compiled anew."""
        return torch.compiler.set_stance("force_eager")

    def undo(self) -> None:
        """Let the modules run as they did before."""
        for module in self.modules:
            module._compiled_call_impl = None


def compile_flow(flow: Flow, whole: bool = True) -> Compilation:
    """Compile the training direction of ``flow`` in place; names in its state dict stay.

    To be called once the flow is initialized, and after a copy of it, such as EMA's, has been made. Batches should all
    have one size.

    Args:
        whole: as one program, unless the flow is deep or has layers that cannot be compiled; False: by regions.

    Raises:
        UsageError: nothing in the flow can be compiled, or this machine lacks what compiling needs.
    """
    _share_classes(flow)
    found = list(regions(flow.bijection))
    if not found:
        raise UsageError("compile=true: nothing in this flow can be compiled; use compile=false")
    use_cache()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # torch warns itself
    logging.getLogger("torch.utils.cpp_extension").addFilter(_matters)
    _try(found[0])
    left_out = traced_layers(flow) or sequential_layers(flow.bijection)
    if left_out:
        log.info(
            "compile: %d layers of the flow; what solves an ODE, sums a series or goes element by element is left out",
            len(found),
        )
    compilation = Compilation([flow] if whole and not left_out and len(found) <= DEEP else found)
    # torch counts all regions together, for each number of threads; see Compilation.shapes for the factor
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 6 * compilation.shapes)
    torch._inductor.config.cpp.dynamic_threads = True  # code for any number of threads
    for module in compilation.modules:
        module.compile(fullgraph=True, dynamic=False)
    return compilation


def _matters(record: logging.LogRecord) -> bool:
    """False for a warning that there is no GPU."""
    return "No CUDA runtime" not in record.getMessage()


def compile_and_try(flow: Flow, step: Callable[[], object], whole: bool = True) -> Compilation:
    """:func:`compile_flow`, and ``step()``, which runs the flow forward and backward, once.

    Raises:
        UsageError: as there, or that step fails compiled and not otherwise. The flow is then as it was.
    """
    compilation = compile_flow(flow, whole)
    try:
        step()
    except Exception as error:  # of many kinds
        compilation.undo()
        if isinstance(error, FlowtrainError | torch.OutOfMemoryError):
            raise
        step()  # raises where the compiler is not to blame
        raise compile_error(error) from error
    return compilation


def use_cache() -> Path:
    """The directory of compiled code, one for all runs of a user: ``TORCHINDUCTOR_CACHE_DIR``, or else
    flowtrain/inductor in the user's cache directory (``XDG_CACHE_HOME``); torch's own where that cannot be written.

    A process that torch's compiler has not been imported into takes the variable for the user's.
    """
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    theirs = sys.modules.get("torch._inductor.runtime.cache_dir_utils")  # not imported here, which takes seconds
    if given is None or theirs and given == theirs.default_cache_dir():  # which torch itself has set
        try:
            path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowtrain" / "inductor"
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (OSError, RuntimeError):
            from torch._inductor.runtime.cache_dir_utils import default_cache_dir

            path = Path(default_cache_dir())
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).absolute()


def regions(bijection: Bijection) -> Iterator[Bijection]:
    """The modules that are compiled as one: each layer that a Chain repeats; elsewhere each coupling or autoregressive
    layer.

    Never a layer whose steps or terms depend on values, such as an ODE, nor one that computes its elements one by one.
    """
    if bijection.inverts_layers:  # their forward is not called
        return
    whole = not traced_layers(bijection) and not sequential_layers(bijection)
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
    """Give modules that differ only in their weights one class: torch gives each module with a parametrization, such as
    weight normalization, a class of its own, and different classes share no program."""
    classes: dict = {}
    for part in module.modules():
        if is_parametrized(part):
            kind = type(part).__bases__, tuple(part.parametrizations)
            part.__class__ = classes.setdefault(kind, type(part))


def signature(module: nn.Module) -> tuple:
    """Equal for modules that compile to one program: the same classes, sizes and settings, whatever the weights."""
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
    """Raise UsageError where torch.compile cannot work at all: the device has no compiler, or one that fails."""

    def square(x: Tensor) -> Tensor:
        return (x * x).sum()

    device = next(region.parameters()).device
    try:
        torch.compile(square, fullgraph=True)(torch.ones(4, device=device, requires_grad=True)).backward()
    except Exception as error:  # of many kinds
        raise compile_error(error) from error


def compile_error(error: Exception) -> UsageError:
    """A failed compilation, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join([f"{type(error).__name__}:", *lines[:2]])  # of a compiler's error, the first names the backend
    return UsageError(f"compile=true: torch.compile does not work here ({reason}); use compile=false")


@contextmanager
def compile_errors():
    """Raise UsageError where torch.compile fails within it."""
    try:
        yield
    except Exception as error:
        if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
            raise compile_error(error) from error
        raise
