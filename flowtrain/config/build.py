"""From a configuration to the objects that it describes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

import torch
from omegaconf import OmegaConf

from flowtrain.config.allow import check_targets
from flowtrain.config.schema import TrainConfig
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


def build_flow(config: TrainConfig, device: torch.device | str) -> Flow:
    """The flow of ``config``, its random start a function of ``config.seed`` alone.

    Raises:
        UsageError: a constructor rejects one of its arguments.
    """
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return build(config.model["flow"], "model.flow", allow=config.allow)
    torch.manual_seed(config.seed)
    return build(config.model["flow"], "model.flow", allow=config.allow).to(device)
