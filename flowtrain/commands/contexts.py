"""The context that a user samples a conditional flow with: a class, or values of a table's context columns."""

from __future__ import annotations

import torch
from torch import Tensor

from flowtrain.commands import SampleConfig
from flowtrain.data import Columns
from flowtrain.data.images import label_context
from flowtrain.errors import UsageError
from flowtrain.flow import Flow


def contexts(config: SampleConfig, flow: Flow, columns: Columns | None) -> Tensor | None:
    """The context of each sample, (n, *context_shape) on the flow's device; None for an unconditional flow.

    ``config.label`` is the class of the ``config.n`` samples, or a list, for n of each class in turn; None: n samples
    of which each is of the next class. ``config.context`` maps each context column of a table to a value. Raises
    UsageError where they do not fit the flow.
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
    if config.label is None:
        labels = torch.arange(config.n) % classes
    else:
        chosen = config.label if isinstance(config.label, list) else [config.label]
        labels = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(config.n)
    if not len(labels) or labels.max() >= classes:
        raise UsageError(f"label={config.label}: the classes are 0 to {classes - 1}")
    return label_context(labels, classes).to(device)


def _of_columns(given: dict, columns: Columns) -> Tensor:
    names = columns.context_names
    if set(given) != set(names):
        wanted = ", ".join(f"{name}: …" for name in names)
        raise UsageError(f"this flow is conditional on {', '.join(names)}: give context='{{{wanted}}}'")
    return columns.encode_context({name: [given[name]] for name in names})
