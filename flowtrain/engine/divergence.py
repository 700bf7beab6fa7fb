"""Where training first met a number that is not finite: which layer, in which direction, for which examples.

The step is computed once more, layer by layer, with a look at each result: slow, and done only once a run has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor, nn

from flowtrain.bijections.backpropagation import ActivationCheckpointing
from flowtrain.engine.statistics import computing_layers
from flowtrain.flow import Flow
from flowtrain.runtime import global_batch, modes

_FORWARD, _BACKWARD, _PARAMETERS, _NORM = range(4)
_END = 2**31  # after every layer


@dataclass(frozen=True)
class Finding:
    """A result that is not finite although everything computed before it is.

    Attributes:
        order: sorts findings by time; the same in all parts and processes.
        layer: dotted name of the layer to blame; "data", "context", "base" or "loss" where it is none.
        what: description, as in "the output of layer couplings.0.even".
        rows: rows of the global batch; empty where the result belongs to no example.
    """

    order: tuple[int, int]
    layer: str
    what: str
    rows: tuple[int, ...] = ()


def examine(flow: Flow, step: Callable[[], Tensor]) -> Finding | None:
    """The first finding in a training step of ``flow``, forward and backward; None where all is finite.

    ``step`` returns its loss and does not clip the gradient. To be called by every process.
    """
    backpropagation = flow.backpropagation
    # this calls every layer, and needs no more memory than the step itself
    flow.set_backpropagation(ActivationCheckpointing())
    try:
        with modes.using(layer_by_layer=True, repeating=True), _watch(flow) as (found, places):
            loss = step()
    finally:
        flow.set_backpropagation(backpropagation)
    if not loss.isfinite():
        found.append(Finding((_FORWARD, _END + 1), "loss", "the loss"))
    found += _in_parameters(flow, places)
    gradients = _gradients(flow)
    if not nn.utils.get_total_norm([gradient for _, gradient in gradients]).isfinite():
        name, _ = max(gradients, key=lambda pair: pair[1].abs().max().item())
        found.append(Finding((_NORM, 0), _owner(name, places), f"the gradient's norm, most of it of {_short(name)}"))
    return _with_weight(flow, first(found), places)


def first(found: Iterable[Finding | None]) -> Finding | None:
    """The earliest of some findings, with the rows of all findings of the same result."""
    found = [each for each in found if each is not None]
    if not found:
        return None
    least = min(found, key=lambda each: each.order)
    rows = {row for each in found if each.order == least.order and each.what == least.what for row in each.rows}
    return Finding(least.order, least.layer, least.what, tuple(sorted(rows)))


@contextmanager
def _watch(flow: Flow) -> Iterator[tuple[list[Finding], dict[str, int]]]:
    """Look at everything that passes through ``flow`` within it.

    Yields the findings, and for each layer's name its place in the order of calls.
    """
    found: list[Finding] = []
    places: dict[str, int] = {}
    calls = count()

    def is_wrong(numbers: Tensor) -> Tensor:
        return ~numbers.detach().isfinite().reshape(len(numbers), -1).all(1)

    def look(order, layer: str, what: str, row: int, numbers: Tensor, known: Tensor | None = None) -> None:
        wrong = is_wrong(numbers) if known is None else is_wrong(numbers) & ~known
        if wrong.any():
            rows = (row + wrong.nonzero().flatten()).tolist()
            found.append(Finding(order, layer, what, tuple(rows)))

    def look_back(place: int, layer: str, what: str, tensor: Tensor) -> None:
        row = global_batch.first_row()
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: look((_BACKWARD, -place), layer, what, row, gradient))

    def begin(_flow, inputs):
        nonlocal calls
        calls = count()
        for name, tensor in zip(("data", "context"), inputs):
            if tensor is not None and tensor.is_floating_point():
                shown = flow.hide_missing(tensor) if name == "data" else flow.hide_padding(tensor)
                look((_FORWARD, -1), name, f"the {name}", global_batch.first_row(), shown)

    def enter(name: str, _layer, inputs):
        x, *rest = inputs
        places[name] = next(calls)
        if torch.is_grad_enabled() and x.is_floating_point():
            x = (x if x.requires_grad else x.detach().requires_grad_()).clone()  # for this layer alone
            look_back(places[name], name, f"the gradient of layer {name}'s input", x)
        return x, *rest

    def leave(name: str, _layer, inputs, outputs):
        known = is_wrong(inputs[0])  # found before, or a missing value on its way to the layer that fills it
        for what, output in zip(("output", "log-determinant"), outputs):
            look((_FORWARD, places[name]), name, f"the {what} of layer {name}", global_batch.first_row(), output, known)

    def end(_bijection, _inputs, outputs):
        look_back(_END, "base", "the gradient of the base", outputs[0])

    def finish(_flow, _inputs, log_prob):
        look((_FORWARD, _END), "base", "the log-likelihood, of the base", global_batch.first_row(), log_prob)
        look_back(_END + 1, "loss", "the gradient of the loss", log_prob)

    handles = [flow.register_forward_pre_hook(begin), flow.register_forward_hook(finish)]
    for name, layer in computing_layers(flow):
        handles += [
            layer.register_forward_pre_hook(lambda *call, name=name: enter(name, *call)),
            layer.register_forward_hook(lambda *call, name=name: leave(name, *call)),
        ]
    handles.append(flow.bijection.register_forward_hook(end))
    try:
        yield found, places
    finally:
        for handle in handles:
            handle.remove()


def _gradients(flow: Flow) -> list[tuple[str, Tensor]]:
    return [(name, one.grad) for name, one in flow.named_parameters() if one.grad is not None]


def _in_parameters(flow: Flow, places: dict[str, int]) -> Iterator[Finding]:
    for name, gradient in _gradients(flow):
        if not gradient.isfinite().all():
            layer = _owner(name, places)
            yield Finding((_PARAMETERS, -places.get(layer, _END)), layer, f"the gradient of {_short(name)}")


def _with_weight(flow: Flow, found: Finding | None, places: dict[str, int]) -> Finding | None:
    """The finding, with a remark if a weight of its layer is not finite itself."""
    for name, weight in flow.named_parameters():
        if found and _owner(name, places) == found.layer and not weight.isfinite().all():
            return replace(found, what=f"{found.what}, whose {_short(name)} is not finite")
    return found


def _short(name: str) -> str:
    return name.removeprefix("bijection.")


def _owner(parameter: str, places: dict[str, int]) -> str:
    """The innermost layer that holds a parameter."""
    name = _short(parameter)
    holders = [layer for layer in places if name.startswith(f"{layer}.")]
    return max(holders, key=len, default=name.partition(".")[0])
