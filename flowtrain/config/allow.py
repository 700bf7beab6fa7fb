"""The classes that a configuration may name: an exact list, since a checkpoint may come from a stranger.

A prefix would be no boundary: ``torch.optim.adam.torch.hub.os.mkdir`` starts with ``torch.optim``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch.optim

from flowtrain.errors import UsageError

MODULES = (
    "flowtrain.flows",
    "flowtrain.flows.parts",
    "flowtrain.bijections",
    "flowtrain.nets",
    "flowtrain.distributions",
    "flowtrain.flow",
    "flowtrain.data",
    "flowtrain.targets",
    "flowtrain.engine.schedules",
    "flowtrain.engine.objectives",
    "flowtrain.engine.loggers",
)


@cache
def allow_list() -> frozenset[str]:
    """Every public class or function of flowtrain's parts, and the optimizers of torch.optim."""
    names = {f"{name}.{public}" for name in MODULES for public in _public(importlib.import_module(name))}
    for name, item in vars(torch.optim).items():
        if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer:
            names.add(f"torch.optim.{name}")
    return frozenset(names)


def check_targets(config, allow=(), where: str = "") -> None:
    """Raise UsageError for a ``_target_`` in a plain ``config`` that is not allowed; ``where``: its dotted key."""
    names = allow_list().union(*(_own_names(module) for module in allow))
    for key, mapping in find_targets(config, where):
        target = mapping["_target_"]
        if not isinstance(target, str) or target not in names:
            near = difflib.get_close_matches(str(target), names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{key}: _target_ {target} is not allowed{hint} (your own classes: allow=[module])")


def find_targets(config, key: str):
    """Yield the dotted key and the mapping of each ``_target_`` in a plain ``config``, whose own key is ``key``."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield key, config
        items = config.items()
    else:
        items = enumerate(config) if isinstance(config, list) else ()
    for name, value in items:
        yield from find_targets(value, f"{key}.{name}" if key else str(name))


def find_function(key: str, given: str, allow=()) -> Callable:
    """The function that ``key=module:function`` names, of a module in ``allow``. Raises UsageError."""
    module, _, name = given.partition(":")
    if module not in allow:
        raise UsageError(f"{key}={given}: imports {module} only with allow=[{module}]")
    found = getattr(_import(module), name, None)
    if not callable(found):
        near = difflib.get_close_matches(name, vars(_import(module)), 1)
        raise UsageError(
            f"{key}={given}: {module} has no function {name}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return found


def _public(module) -> list[str]:
    """``__all__``, else the classes and functions that the module itself defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if callable(getattr(module, name))]
    return [
        name
        for name, item in vars(module).items()
        if not name.startswith("_") and callable(item) and getattr(item, "__module__", None) == module.__name__
    ]


def _own_names(name: str) -> set[str]:
    """The names that a user's module itself defines, not those that it imports."""
    return {
        f"{name}.{public}"
        for public, item in vars(_import(name)).items()
        if callable(item) and getattr(item, "__module__", None) == name
    }


def _import(name: str) -> ModuleType:
    """A module of the user's own, which may lie in the working directory. Raises UsageError."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as with python -m
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"allow=[{name}]: cannot be imported ({error})") from error
