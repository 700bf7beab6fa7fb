"""From a configuration to the objects that it describes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from flowtrain.config.allow import check_targets, find_function, find_targets
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Columns
from flowtrain.data.dataset import Dataset
from flowtrain.data.spec import DataSpec
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.flows.angles import with_angles


def build(node: dict, where: str, *, allow=(), **kwargs):
    """The object that ``node``, a mapping with a ``_target_``, describes; ``kwargs`` add or replace arguments.

    Args:
        where: the dotted key of the node, for messages.
        allow: modules whose own classes a ``_target_`` may name, beside the allow-list.

    Raises:
        UsageError: a ``_target_`` is not allowed, a constructor does not take one of its arguments, or rejects its
            value (by ValueError, TypeError or RuntimeError).
    """
    check_targets(node, allow, where)
    _check_arguments(node, where)
    for key, value in node.items():
        if "${" in str(value):  # OmegaConf would read an interpolation
            raise UsageError(f"{where}.{key}: no name or text can hold '${{', which begins an interpolation")
    try:
        return instantiate(node, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, FlowtrainError):
            raise cause from None
        if cause is None or isinstance(cause, ValueError | TypeError | RuntimeError):
            _, found, key = str(error).rpartition("full_key: ")  # below node
            inner = key.strip() if found else ""
            text = cause or str(error).splitlines()[0]
            raise UsageError(f"{'.'.join(filter(None, (where, inner)))}: {text}") from error
        raise cause from None  # not from error, whose cause it is: the chain would have no end


def _check_arguments(node: dict, where: str) -> None:
    """Raise UsageError for a key that the constructor of its mapping does not take; all targets are allowed."""
    for key, mapping in find_targets(node, where):
        module, _, name = mapping["_target_"].rpartition(".")
        takes = _arguments_of(getattr(importlib.import_module(module), name))
        for argument in mapping:
            if takes is not None and argument not in takes and not argument.startswith("_"):
                near = difflib.get_close_matches(argument, takes, 1)
                hint = f"; did you mean '{key}.{near[0]}'?" if near else f": {name} takes no such argument"
                raise UsageError(f"no key '{key}.{argument}'{hint}")


def _arguments_of(target: Callable) -> set[str] | None:
    """The names of a constructor's arguments, with those that our classes hand to their bases by ``**``; None: any."""
    names: set[str] = set()
    classes = [kind for kind in getattr(target, "__mro__", (object,))[:-1] if "__init__" in vars(kind)]
    for function in [vars(kind)["__init__"] for kind in classes] or [target]:
        parameters = inspect.signature(function).parameters.values()
        names |= {parameter.name for parameter in parameters} - {"self"}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return names
        if not function.__module__.startswith("flowtrain."):
            break
    return None


def build_dataset(config: TrainConfig, columns: dict | None = None) -> Dataset:
    """The data set of ``config``; of a table, with ``columns`` as a checkpoint recorded them. Opens no file.

    Raises:
        UsageError: a key that the data set does not take, or the value of one.
    """
    data = build(config.dataset, "dataset", allow=config.allow, on_bad=config.on_bad, **_target_of(config))
    data.use_functions(partial(find_function, allow=config.allow))
    if columns:
        data.use_columns(Columns.from_record(columns))
    return data


def _target_of(config: TrainConfig) -> dict:
    """The target of ``config`` as an argument of its data set; {} where it learns from data."""
    kind, target = config.dataset["_target_"], config.target
    takes_target = isinstance(kind, str) and kind == "flowtrain.data.TargetData"
    if takes_target and not target:
        raise UsageError("target: give one, such as target=funnel, or your own as target=my_module:log_prob")
    if target and not takes_target:
        raise UsageError("target: only objective=reverse_kl and objective=alpha2 learn from a target; choose one")
    return {"target": build(target, "target", allow=config.allow)} if target else {}


def build_flow(config: TrainConfig, spec: DataSpec, device: torch.device | str) -> Flow:
    """The flow of ``config.model`` for the data that ``spec`` describes.

    The model's node names a constructor, such as those of :mod:`flowtrain.flows`, and its arguments. What else the
    constructor takes comes from ``spec`` (shape, context_shape, grey_levels, columns) and from ``config.parts``, such
    as ``univariate`` and ``base``, unless the model's node sets that part itself. An empty part is None. The random
    start is a function of ``config.seed`` alone.

    Raises:
        UsageError: an unknown argument, one that a constructor rejects, or a part that the model does not read.
    """
    device = torch.device(device)
    data = {
        "shape": spec.shape,
        "context_shape": spec.context_shape,
        "grey_levels": spec.grey_levels,
        "columns": spec.columns,
    }
    model = {name: value for name, value in config.model.items() if value is not None or name not in config.parts}
    parts = {name: node for name, node in config.parts.items() if name not in config.model}
    for name in config.parts:
        node = model.get(name)
        if node and isinstance(node, dict) and "_target_" not in node:  # +model.univariate.bins=3
            raise UsageError(f"no key 'model.{name}.{min(node)}'; did you mean '{name}.{min(node)}'?")
    dequantize = _constructor(parts.get("dequantize"), "dequantize", config.allow, data)
    noise = {"dequantize": dequantize} if dequantize else {}
    factories = {name: _constructor(node, name, config.allow, data, noise) for name, node in parts.items()}
    make = _constructor(_null_empty(model), "model", config.allow, data, factories)
    takes = inspect.signature(make.func).parameters
    for name, node in parts.items():  # layers may refer to any part
        comes_with_data = name in ("preprocess", "dequantize", "angles")
        if node and name not in takes and not comes_with_data and "layers" not in takes:
            raise UsageError(f"{name}: nothing in this model reads it; leave it out")
    if dequantize and (spec.grey_levels is None or "dequantize" not in _keywords(factories.get("preprocess"))):
        raise UsageError("dequantize: only preprocess=center, logit and normalize of integers read it; leave it out")
    if parts.get("embedding") and spec.context is None:
        raise UsageError("embedding: there is no context to embed; set dataset.context, or leave embedding=none")
    columns = spec.columns or ()
    if any(column.missing for column in columns) and not parts.get("preprocess"):
        raise UsageError("preprocess=none: nothing fills missing values; use preprocess=standardize or quantile")
    if angles := [i for i, column in enumerate(columns) if column.kind == "angle"]:
        of_all = ("preprocess", "embedding")  # the angles too
        others = partial(make, **{name: None for name in of_all if name in takes})
        given = {name: factories[name] for name in (*of_all, "angles") if factories.get(name)}
        make = partial(with_angles, others, spec.shape, columns=angles, context_shape=spec.context_shape, **given)
    if device.type != "meta":
        torch.manual_seed(config.seed)
    try:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            flow = make()
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error).removeprefix("bijection: ")
        of_part = text.startswith(("embedding: ", "preprocess: "))
        raise UsageError(text if of_part else f"{_key_of(text, config.model)}: {text}") from error
    return flow if device.type == "meta" else flow.to(device)


def _keywords(factory: partial | None) -> dict:
    return factory.keywords if factory else {}


def _null_empty(node):
    """``node`` with None for each empty mapping, which is a part's option ``none``; ``layers`` may be empty."""
    if isinstance(node, list):
        return [_null_empty(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: None if value == {} and key != "layers" else _null_empty(value) for key, value in node.items()}


def _key_of(text: str, model: dict) -> str:
    """The key of ``model`` that a constructor's message is about, such as model.levels=9; else model."""
    for name, value in model.items():
        if value is not None and re.search(rf"\b{name}={re.escape(str(value))}(?!\w)|fewer {name}\b", text):
            return f"model.{name}={value}"
    return "model"


def build_objective(config: TrainConfig, spec: DataSpec):
    """What a step of ``config`` minimizes on the data that ``spec`` describes."""
    offered = {"grey_levels": spec.grey_levels, "shape": spec.shape, "target": spec.target}
    make = _constructor(config.objective, "objective", config.allow, offered)
    if (spec.target is not None) != ("target" in inspect.signature(make.func).parameters):
        name = make.func.__name__
        raise UsageError(
            f"objective: {name} learns from data, not from a target; use reverse_kl or alpha2"
            if spec.target is not None
            else f"objective: {name} learns from a target, not from data: leave dataset= out and give target=NAME"
        )
    try:
        return make()
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"objective: {error}") from error


def _constructor(node: dict, where: str, allow, data: dict, parts: dict | None = None) -> Callable | None:
    """What a node names, with the node's arguments and those of ``data`` and ``parts`` that it takes; None for an empty
    node."""
    if not node:
        return None
    for name in data:
        if name in node:
            raise UsageError(f"{where}.{name}: the dataset decides this")
    make = build({**node, "_partial_": True}, where, allow=allow)
    takes = inspect.signature(make.func).parameters
    offered = {**data, **(parts or {})}
    return partial(make, **{name: offered[name] for name in offered if name in takes and name not in make.keywords})


def model_name(config: TrainConfig) -> str:
    """The name of the model's constructor, such as glow."""
    return config.model["_target_"].rpartition(".")[2]
