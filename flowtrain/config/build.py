"""From a configuration to the objects that it describes."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from omegaconf import OmegaConf

from flowtrain.config.allow import check_targets
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Columns
from flowtrain.data.dataset import Dataset
from flowtrain.data.spec import DataSpec
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow


def build(node: dict, where: str, *, allow=(), **kwargs):
    """The object that ``node``, a mapping with a ``_target_``, describes; ``kwargs`` add or replace arguments.

    Args:
        where: the dotted key of the node, for messages.
        allow: modules whose own classes a ``_target_`` may name, beside the allow-list.

    Raises:
        UsageError: a constructor rejects one of its arguments (by ValueError, TypeError or RuntimeError), or a
            ``_target_`` is not allowed.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    check_targets(node, allow, where)
    try:
        return instantiate(node, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FlowtrainError):
            raise cause from None
        if cause is None or isinstance(cause, ValueError | TypeError | RuntimeError):
            _, found, key = str(error).rpartition("full_key: ")  # below node
            inner = key.strip() if found else ""
            text = add_hint(str(cause or str(error).splitlines()[0]), _select(node, inner))
            raise UsageError(f"{'.'.join(filter(None, (where, inner)))}: {text}") from error
        raise cause from None  # not from error, whose cause it is: the chain would have no end


def _select(node: dict, key: str):
    return OmegaConf.select(OmegaConf.create(node), key) if key else node


def add_hint(text: str, node) -> str:
    """``text``, a constructor's message about an argument that it does not know, with the nearest key of ``node``."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if not unknown or not isinstance(node, Mapping):
        return text
    near = difflib.get_close_matches(unknown[1], [name for name in node if name != unknown[1]], 1)
    return f"{text}; did you mean '{near[0]}'?" if near else text


def build_dataset(config: TrainConfig, columns: dict | None = None) -> Dataset:
    """The data set of ``config``; of a table, with ``columns`` as a checkpoint recorded them. Opens no file.

    Raises:
        UsageError: a key that the data set does not take, or the value of one.
    """
    data = build(config.dataset, "dataset", allow=config.allow, on_bad=config.on_bad)
    if columns:
        data.use_columns(Columns.from_record(columns))
    return data


def build_flow(config: TrainConfig, spec: DataSpec, device: torch.device | str) -> Flow:
    """The flow of ``config.model`` for the data that ``spec`` describes.

    The model's node names a constructor, such as those of :mod:`flowtrain.flows`, and its arguments. What else the
    constructor takes comes from ``spec`` (shape, context_shape, grey_levels) and from ``config.parts``, such as
    ``univariate`` and ``base``, unless the model's node sets that part itself. The random start is a function of
    ``config.seed`` alone.

    Raises:
        UsageError: an unknown argument, or one that a constructor rejects.
    """
    device = torch.device(device)
    data = {"shape": spec.shape, "context_shape": spec.context_shape, "grey_levels": spec.grey_levels}
    parts = {
        name: _constructor(node, name, config.allow, data)
        for name, node in config.parts.items()
        if name not in config.model
    }
    own = {name: value for name, value in config.model.items() if value is not None or name not in config.parts}
    make = _constructor(own, "model", config.allow, {**data, **parts})
    if device.type != "meta":
        torch.manual_seed(config.seed)
    try:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            flow = make()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"model: {error}") from error
    return flow if device.type == "meta" else flow.to(device)


def build_objective(config: TrainConfig, spec: DataSpec):
    """What a step of ``config`` minimizes on the data that ``spec`` describes."""
    make = _constructor(config.objective, "objective", config.allow, {"grey_levels": spec.grey_levels})
    try:
        return make()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"objective: {error}") from error


def _constructor(node, where: str, allow, offered: dict) -> Callable | None:
    """What a node names, with the node's arguments and those of ``offered`` that it takes; None for an empty node."""
    if not node:
        return None
    make = build({**node, "_partial_": True}, where, allow=allow)
    takes = inspect.signature(make.func).parameters
    for name in make.keywords:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 1)
            hint = f"; did you mean '{where}.{near[0]}'?" if near else ""
            raise UsageError(f"no key '{where}.{name}': {node['_target_']} takes no such argument{hint}")
    missing = {name: offered[name] for name in offered if name in takes and name not in make.keywords}
    return partial(make, **missing)


def model_name(config: TrainConfig) -> str:
    """The name of the model's constructor, such as glow."""
    return config.model["_target_"].rpartition(".")[2]
