"""Modes that change what layers compute, such as an exact trace: one immutable value in one context variable.

Every thread has its own modes, so that two threads can use a flow in different modes at the same time. The backward
pass may run in a thread of autograd's, which starts without modes: a function that recomputes there keeps
:func:`current` of its forward pass and enters it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.runtime.noise import ExampleNoise, GivenNoise


@dataclass(frozen=True)
class Modes:
    """What layers may ask of the work in progress.

    Attributes:
        first_row: the row of the global batch at which this process's batch begins.
        global_rows: rows in the global batch; None if the batch at hand is all of it.
        noise: where the random numbers of the examples come from; None: from torch's generator.
        bin_centres: dequantization maps each integer to the centre of its bin: noise is ½ everywhere.
        kept: what has been computed from weights alone, for the batches to come; None: nothing is kept.
        log_dets: log|det W| of layers, computed for all of them at once; None: each layer computes its own.
        stored_moments: batch normalization uses its running moments in training mode too, and leaves them as they are.
        affines: likewise W, b and the log-determinant of neighbouring affine maps, by the layers that they are of.
        repeating: this work has been done before, so that running statistics must not count it again.
        layer_by_layer: every layer is called by itself; none is fused with its neighbours.
        exact_trace: ODEs integrate the exact trace, and other log-determinants from traces are exact.
        states_only: no trace is computed; log-determinants from them are NaN.
        jacobi: iterates the inverses of autoregressive layers to their fixed points; None: element after element.
        guidance: how much more the context of such an inverse counts; 0: as the flow has it.
        noisy: data come with the noise of training on them, and stay so.
        tracing: the work is recorded as a program for values to come: no check may read a value.
        equations: what stands in for the solution of each ODE, a function of its layer, input and context; None: it is
            solved.
        probes: with how many noises a stochastic trace is estimated; their mean is the log-determinant.
        spreads: where to append the variance, for each example, of that mean; None: it is not computed.
        tolerance: of adaptive solvers of ODEs, in place of their own; None: their own.
        step_factor: how many times as many steps a fixed solver of ODEs takes.
        unsolved: where to append why an ODE or a fixed point has no solution, which then is NaN; None: it raises
            FloatingPointError.
    """

    first_row: int = 0
    global_rows: int | None = None
    noise: ExampleNoise | GivenNoise | None = None
    bin_centres: bool = False
    kept: dict | None = None
    log_dets: dict[nn.Module, Tensor] | None = None
    stored_moments: bool = False
    affines: dict[tuple[nn.Module, ...], tuple[Tensor, Tensor | None, Tensor]] | None = None
    repeating: bool = False
    layer_by_layer: bool = False
    exact_trace: bool = False
    states_only: bool = False
    jacobi: Any = None
    guidance: float = 0.0
    noisy: bool = False
    tracing: bool = False
    equations: Callable[[nn.Module, Tensor, Tensor | None], Tensor] | None = None
    probes: int = 1
    spreads: list[Tensor] | None = None
    tolerance: float | None = None
    step_factor: int = 1
    unsolved: list[str] | None = None


_DEFAULT = Modes()
_modes: ContextVar[Modes] = ContextVar("flowtrain_modes", default=_DEFAULT)
# torch.compile traces context variables from 2.14 on; before, compiled code reads the last modes that were entered
_TRACES_CONTEXT_VARIABLES = torch.__version__ >= (2, 14)
_last = _DEFAULT
# entered within code that is being compiled: it cannot set a context variable, and needs them only while it is traced
_traced: Modes | None = None


def current() -> Modes:
    """The modes of this thread."""
    if torch.compiler.is_compiling():
        if _traced is not None:
            return _traced
        if not _TRACES_CONTEXT_VARIABLES:
            return _last
    return _modes.get()


def values_are_known() -> bool:
    """Whether a check may read values: not where a program for values to come is made, by a compiler or an export."""
    return not (torch.compiler.is_compiling() or current().tracing)


@contextmanager
def enter(modes: Modes) -> Iterator[None]:
    """Within it, the modes are ``modes``."""
    global _last, _traced
    if torch.compiler.is_compiling():
        outer, _traced = _traced, modes
        try:
            yield
        finally:
            _traced = outer
        return
    token, before, _last = _modes.set(modes), _last, modes
    try:
        yield
    finally:
        _modes.reset(token)
        _last = before


def using(**changes) -> AbstractContextManager[None]:
    """Within it, some modes differ from the current ones: ``using(exact_trace=True)``.

    >>> with using(first_row=2, global_rows=8):
    ...     current().first_row
    2
    """
    return enter(replace(current(), **changes))


def repeat(modes: Modes) -> AbstractContextManager[None]:
    """Within it, work that was done in ``modes`` is done once more: same rows, same noise, no statistics updated."""
    return enter(replace(modes, repeating=True))
