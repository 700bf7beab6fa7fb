"""The context that a user samples a conditional flow with: a class, or values of a table's context columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowtrain.commands import SampleConfig
from flowtrain.data import Columns
from flowtrain.data.labels import class_number, label_context
from flowtrain.errors import UsageError
from flowtrain.flow import Flow


def contexts(config: SampleConfig, flow: Flow, columns: Columns | None, names: Sequence[str] = ()) -> Tensor | None:
    """The context of ``config.n`` samples, (n, *context_shape) on the flow's device; None for an unconditional flow.

    ``config.label`` is a class, by number or by its name among ``names``, or a list that takes turns; None: all classes
    in turn. ``config.context`` maps each context column of a table to a value. Raises UsageError where they do not fit
    the flow.
    """
    shape = flow.bijection.context_shape
    if config.label is not None and (shape is None or columns):
        raise UsageError(f"label={config.label}: this model is not class-conditional; leave label=null")
    if config.context is not None and not (shape and columns):
        raise UsageError(f"context={config.context}: this model has no context columns; leave context=null")
    if shape is None:
        return None
    device = next(flow.parameters()).device
    if columns:
        return _of_columns(config.context or {}, columns).expand(config.n, *shape).to(device)
    (classes,) = shape
    given = config.label if isinstance(config.label, list | None) else [config.label]
    if given == []:
        raise UsageError("label=[]: give at least one class")
    labels = (
        torch.arange(classes) if given is None else torch.tensor([class_number(one, classes, names) for one in given])
    )
    return label_context(labels[torch.arange(config.n) % len(labels)], classes).to(device)


def _of_columns(given: dict, columns: Columns) -> Tensor:
    names = columns.context_names
    if set(given) != set(names):
        wanted = ", ".join(f"{name}: …" for name in names)
        raise UsageError(f"this flow is conditional on {', '.join(names)}: give context='{{{wanted}}}'")
    return columns.encode_context({name: [given[name]] for name in names})
