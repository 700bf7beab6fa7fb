"""From a checkpoint back to a configuration that Hydra composes on, and to a flow.

A checkpoint may come from a stranger: it is data. Opening one runs none of its code, reads no environment variable and
writes no file. Everything in its configuration is checked before anything is built from it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch.nn.modules.module import register_module_module_registration_hook

from flowtrain.config import earlier, places, runs
from flowtrain.config.allow import check_targets
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.compose import is_part, make_config
from flowtrain.config.conversion import key_names, to_dict, validate
from flowtrain.config.schema import JobConfig, TrainConfig
from flowtrain.data.dataset import Dataset
from flowtrain.data.labels import printable
from flowtrain.errors import FlowtrainError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, environment
from flowtrain.runtime.checkpoint import load_weights

MAX_DEPTH, MAX_SIZE = 40, 50_000  # of a configuration: nesting; keys, items and characters of its texts / 100
MAX_NUMBER, MAX_DIMENSIONS = 2**20, 2**24  # of a whole number in the model, such as a width, and of an example
NODES = ("model", "dataset", "trainer", "objective", "optimizer", "scheduler", "logger")  # that are mappings
# keys of dataset that this machine and this command decide, never the file
LOCAL = {"root": "${oc.env:FLOWTRAIN_DATA,data}", "path": None, "download": True}
DROPPED = ("devices", "threads", "allow", "dist", "job_timeout")
UNSET = {"init": None, "resume": False, "dry_run": False}
NAMING = ("types", "read", "prior")  # mappings of dataset that have names of columns as keys
SPECIAL = ("_recursive_", "_convert_", "_args_")  # keys that Hydra obeys, besides _target_ and _partial_


def load(path: str, weights: str = "auto", allow=()):
    """The flow of a run directory or a checkpoint, on the CPU and in evaluation mode.

    Args:
        path: of the run directory, or of the file.
        weights: ``ema`` (averaged), ``raw``, or ``auto``: the averaged weights where the checkpoint has them.
        allow: names of modules whose own classes the checkpoint may name.

    Raises:
        UsageError: there is no run or checkpoint at ``path``.
        FlowtrainError: the checkpoint is damaged, or names a class that is not allowed.

    For example ``flow = flowtrain.load("outputs/digits-glow/…")``, then ``flow.sample(16)``. The checkpoint is read as
    data: no code from it runs.
    """
    file = runs.checkpoint_in(path, "load")
    config, state = checkpoint_config(file, allow), checkpoint.read(file)
    config = replace(config, allow=list(allow))
    flow = build_flow(config, build_dataset(config, state["columns"]).spec, "cpu")
    load_weights(flow, state, weights)
    return flow.eval()


def checkpoint_config(file: Path, allow=()) -> TrainConfig:
    """The configuration in a checkpoint, checked as plain data before anything is built from it. Then its flow is built
    on the meta device and compared with the weights in the file.

    Raises:
        FlowtrainError: the file is damaged, not a flowtrain checkpoint, or names a class that is not allowed.
    """
    state = checkpoint.read(file, mmap=True)
    try:
        values = earlier.update(state.get("config"))
        _check_plain(values)
        check_targets(values, allow)
        config = validate(TrainConfig, values)
        _check_flow(replace(config, allow=list(allow)), state)
    except Exception as error:  # whatever a constructor raises for a stranger's values
        text = " ".join(str(error).split()) or type(error).__name__
        text = "".join(letter if letter.isprintable() else "?" for letter in text)  # no control characters
        raise FlowtrainError(f"{file}: its configuration is refused: {text[:300]}") from error
    return config


def record_config(file: Path, allow=()) -> TrainConfig:
    """The configuration in Hydra's record of a run, checked like that of a checkpoint.

    Raises:
        FlowtrainError: the file cannot be read, names a class that is not allowed, or asks for values from elsewhere.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        values["dataset"]["root"] = "data"  # in place of an interpolation; the run or this machine decides
        values = {"dry_run": False} | {key: value for key, value in values.items() if key != "run"}
        if foreign := re.search(r"\$\{[^}]*:[^}]*\}", str(values)):  # of a resolver, such as oc.env
            raise ValueError(f"it holds an interpolation: {foreign[0][:60]}")
        config = make_config(OmegaConf.create(values))
        _check_plain(to_dict(config))
        check_targets(to_dict(config), allow)
    except Exception as error:
        raise FlowtrainError(f"{file}: its configuration is refused: {' '.join(str(error).split())[:300]}") from error
    return config


def started_in(record: Path) -> str:
    """The folder in which the run of a record of Hydra's was started; "" where that is not known."""
    try:
        return str(OmegaConf.to_container(OmegaConf.load(record.with_name("hydra.yaml")))["hydra"]["runtime"]["cwd"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return ""


def measured_batch_size(file: Path) -> int | None:
    """The batch size of the run that ``file`` belongs to, where it records one."""
    if file.suffix != ".yaml":
        loader = checkpoint.read(file, mmap=True).get("loader")
        size = loader.get("batch_size") if isinstance(loader, dict) else None
    else:
        size = (environment.read(file.parent.parent) or {}).get("batch_size")
    return size if type(size) is int and size > 0 else None


def _check_plain(config) -> None:
    if not isinstance(config, dict):
        raise ValueError("it is not a mapping")
    known = key_names(TrainConfig)
    for key in config:
        if key not in known and not (isinstance(key, str) and re.fullmatch(r"\w+", key) and is_part(key)):
            raise ValueError(f"unknown key {str(key)[:60]}")
    if not all(isinstance(config.get(key), dict) for key in NODES):
        raise ValueError(f"it lacks one of {', '.join(NODES)}")
    naming = [id(config["dataset"].get(key)) for key in NAMING]
    todo, size = [(config, 1)], 0
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"its key {key!r:.60} is not text")
                own = key.startswith("_") and key not in ("_target_", "_partial_") and id(value) not in naming
                if key in SPECIAL or own:
                    raise ValueError(f"it has a key {key[:60]}")
            children = [*value.keys(), *value.values()]
        else:
            children = value if isinstance(value, list) else []
        size += len(children) + (len(value) // 100 if isinstance(value, str) else 0)
        if depth > MAX_DEPTH or size > MAX_SIZE:
            raise ValueError("it is too deep or too large")
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise ValueError(f"it holds an interpolation: {value[:60]}")
        if isinstance(value, str) and not "".join(printable(value).split()).isprintable():
            raise ValueError(f"it holds control characters: {value[:60]}")
        if not isinstance(value, dict | list | str | int | float | None):
            raise ValueError(f"it holds a {type(value).__name__}")
        todo += [(child, depth + 1) for child in children]


def _check_flow(config: TrainConfig, state: dict) -> None:
    """Build the flow on the meta device, which allocates nothing, and the data set, which opens no file: ValueError
    where they are not a Flow and a Dataset, or where the flow's weights are not those of the file. Otherwise a small
    file could ask for any amount of memory.
    """
    stored = [state.get("model"), state.get("ema", "missing") or {}]
    if not all(isinstance(weights, dict) for weights in stored):
        raise ValueError("the file has no weights")
    if "columns" not in state:
        raise ValueError("the file does not say its columns")
    if any(abs(number) > MAX_NUMBER for number in _whole_numbers(config.model)):
        raise ValueError(f"model holds a number beyond {MAX_NUMBER:,}")
    if "path" in config.dataset:  # a stranger's path: the description must not be read from that file
        config = replace(config, dataset=config.dataset | {"path": None})
    data = build_dataset(config, state["columns"])
    if not isinstance(data, Dataset):
        raise ValueError("dataset is not a Dataset")
    spec = data.spec
    if not 0 < math.prod(spec.shape) <= MAX_DIMENSIONS or min(spec.shape) < 1:
        raise ValueError(f"its data are of shape {list(spec.shape)}")
    with _limit_modules(10_000 + 20 * len(stored[0])):
        flow = build_flow(config, spec, "meta")
    if not isinstance(flow, Flow):
        raise ValueError("model is not a Flow")
    if tuple(flow.shape) != spec.shape:
        raise ValueError(f"the flow is of shape {list(flow.shape)}, its data are of shape {list(spec.shape)}")
    expected = flow.state_dict()
    for weights in filter(None, stored):
        for name in sorted({*expected} ^ {*weights}, key=str):
            raise ValueError(f"it does not fit the weights: only one of them has {name}")
        for name, value in weights.items():
            if (found := _describe_tensor(value)) != _describe_tensor(expected[name]):
                raise ValueError(
                    f"it does not fit the weights: {name} is {found}, not {_describe_tensor(expected[name])}"
                )


def _whole_numbers(node) -> Iterator[int]:
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _whole_numbers(child)
    elif isinstance(node, int):
        yield node


def _describe_tensor(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


@contextmanager
def _limit_modules(most: int) -> Iterator[None]:
    """Raise ValueError as soon as more modules are built inside: a short configuration may ask for any number."""
    count = 0

    def count_module(*_) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError("it describes far more layers than there are weights")

    hook = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        hook.remove()


def store_option(group: str, file: Path, allow=(), remember: bool = True) -> str:
    """Store a checkpoint's configuration as an option of the config group ``group``; the option's name.

    Then Hydra's whole grammar applies to it: overrides, sweeps over several checkpoints, ``--cfg``, completion.

    Args:
        remember: whether the data lie where the checkpoint's run directory says; False: at the usual place.
    """
    config = _local_values(file, allow, remember, repeats=group == "run")
    config[group] = str(file).replace("${", "\\${")  # OmegaConf would read an interpolation
    run = runs.run_of(file)
    parts = (run or file.parent).parts[-2:]
    name = re.sub(r"[^\w.-]", "_", "_".join([*parts, file.stem]))
    known = ConfigStore.instance().repo.get(group, {})
    while f"{name}.yaml" in known:
        name += "_"
    ConfigStore.instance().store(group=group, name=name, node=OmegaConf.create(config), package="_global_")
    return name


def command_config(schema, file: Path, job: JobConfig, **keys):
    """The ``schema`` instance of a command on a checkpoint, for callers outside the command line: its data lie where
    the run remembers, ``job`` says how it runs, and ``keys`` are the command's own.

    Raises:
        FlowtrainError: as :func:`checkpoint_config`.
    """
    values = OmegaConf.to_container(OmegaConf.create(_local_values(file, job.allow)), resolve=True)
    how = {key: value for key, value in to_dict(job).items() if key in DROPPED}
    return validate(schema, values | how | keys)


def _local_values(file: Path, allow=(), remember: bool = True, repeats: bool = False) -> dict:
    """A checkpoint's configuration with what this machine decides, some of it interpolations: :func:`store_option`.

    ``repeats``: with all that the run decided too, and the batch size that it measured.
    """
    is_record = file.suffix == ".yaml"
    values = to_dict((record_config if is_record else checkpoint_config)(file, allow))
    config = {key: value for key, value in values.items() if key not in DROPPED} | UNSET
    if repeats:
        config |= {key: values[key] for key in ("devices", "threads", "init")}
        if config["batch_size"] == "auto" and (size := measured_batch_size(file)):
            config["batch_size"] = size
    run = runs.run_of(file)
    if run:
        _check_links(run)
    if "tracking_uri" in config["logger"].get("mlflow", {}):  # a server of a stranger's: it gets no records
        config["logger"]["mlflow"]["tracking_uri"] = None
    remembered = places.remembered(run) if remember else {}
    if is_record and remember and values["dataset"].get("path"):  # the run ended before it could say where they lie
        remembered = {"path": os.path.join(started_in(file), values["dataset"]["path"])} | remembered
    config["dataset"] |= {key: value for key, value in (LOCAL | remembered).items() if key in config["dataset"]}
    return config


def _check_links(run: Path) -> None:
    """Commands write into a run directory: raise FlowtrainError for a link in it, which may lead elsewhere."""
    for folder, folders, files in os.walk(run):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(folder, name)):
                raise FlowtrainError(f"{os.path.join(folder, name)} is a link: a run directory must not contain one")
