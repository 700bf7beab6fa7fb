"""From a composed configuration to the objects that it describes."""

from __future__ import annotations

import difflib
import re

import torch
from omegaconf import DictConfig, OmegaConf

from flowtrain.config.allow import check_targets
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


def build_flow(cfg, device: torch.device | str) -> Flow:
    """The flow of ``cfg``, its random start a function of ``cfg.seed`` alone.

    Raises:
        UsageError: a constructor rejects one of its arguments.
    """
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return build(cfg.model.flow, allow=cfg.allow)
    torch.manual_seed(cfg.seed)
    return build(cfg.model.flow, allow=cfg.allow).to(device)
