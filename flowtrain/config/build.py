"""From a composed configuration to the objects that it describes."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import partial

import torch
from omegaconf import DictConfig, OmegaConf

from flowtrain.config.allow import check_targets
from flowtrain.config.compose import is_part
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow


def build(node: DictConfig, *, allow=(), **kwargs):
    """The object that ``node`` describes; ``kwargs`` join or replace its arguments.

    Every ``_target_`` in it must be in the allow-list, widened by the modules in ``allow``. An argument that a
    constructor refuses (ValueError, TypeError, RuntimeError) is a UsageError that names the node.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    where = node._get_full_key(None) if isinstance(node, DictConfig) else ""
    check_targets(OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node, allow, where)
    try:
        return instantiate(node, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FlowtrainError):
            raise cause from None
        _, found, full_key = str(error).rpartition("full_key: ")
        where = full_key.strip() if found else where
        if cause is None or isinstance(cause, ValueError | TypeError | RuntimeError):
            inner = where.removeprefix(node._get_full_key(None)).lstrip(".") if isinstance(node, DictConfig) else ""
            text = with_hint(str(cause or str(error).splitlines()[0]), OmegaConf.select(node, inner) if inner else node)
            raise UsageError(f"{where}: {text}") from error
        raise cause from None  # not from error, whose cause it is: the chain would have no end


def with_hint(text: str, node) -> str:
    """What a constructor said of an argument of ``node`` that it does not know, with the one beside it that may be
    meant."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if not unknown or not isinstance(node, DictConfig):
        return text
    near = difflib.get_close_matches(unknown[1], [name for name in node if name != unknown[1]], 1)
    return f"{text}; did you mean '{near[0]}'?" if near else text


def build_flow(config, device: torch.device | str) -> Flow:
    """The flow of ``config.model`` for the data of ``config.dataset``.

    The model's node names a constructor, such as those of :mod:`flowtrain.flows`, and its arguments. What else the
    constructor takes comes from the data (shape, context_shape, grey_levels) and from the parts at the root of
    ``config``, such as ``univariate`` and ``base``, unless the model's node sets that part itself. The random start is
    a function of ``config.seed`` alone.

    Raises:
        UsageError: an unknown argument, or one that a constructor rejects.
    """
    device = torch.device(device)
    spec = config.dataset
    data = {"shape": spec.shape, "context_shape": spec.context_shape, "grey_levels": spec.levels}
    parts = {
        name: _constructor(config[name], name, config.allow, data)
        for name in config
        if is_part(name) and name not in config.model
    }
    own = {name: value for name, value in config.model.items() if value is not None or not is_part(name)}
    make = _constructor(own, "model", config.allow, {**data, **parts})
    if device.type != "meta":
        torch.manual_seed(config.seed)
    try:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            flow = make()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"model: {error}") from error
    return flow if device.type == "meta" else flow.to(device)


def _constructor(node, where: str, allow, offered: dict) -> Callable | None:
    """What a node names, with the node's arguments and those of ``offered`` that it takes; None for an empty node."""
    if not node:
        return None
    make = build({**node, "_partial_": True}, allow=allow)
    takes = inspect.signature(make.func).parameters
    for name in make.keywords:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 1)
            hint = f"; did you mean '{where}.{near[0]}'?" if near else ""
            raise UsageError(f"no key '{where}.{name}': {node['_target_']} takes no such argument{hint}")
    missing = {name: offered[name] for name in offered if name in takes and name not in make.keywords}
    return partial(make, **missing)


def model_name(config) -> str:
    """The name of the model's constructor, such as glow."""
    return config.model["_target_"].rpartition(".")[2]
