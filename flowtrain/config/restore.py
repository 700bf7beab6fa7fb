"""From a checkpoint back to a configuration that Hydra composes on, and to a flow.

A checkpoint may come from a stranger: it is data, and opening one runs no code of its own, reads no variable of the
environment and writes no file. What can be wrong with it is said here, before anything is made of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from flowtrain.config import runs
from flowtrain.config.build import build, build_flow
from flowtrain.config.compose import is_part
from flowtrain.config.schema import ROOTS, known_keys, settled
from flowtrain.errors import FlowtrainError

MAX_DEPTH, MAX_SIZE = 40, 50_000  # of a configuration: nesting; keys, items and characters of its texts / 100
MAX_NUMBER, MAX_DIMENSIONS = 2**20, 2**24  # of a whole number in the model, such as a width, and of an example
NEEDED = ("model", "dataset", "trainer", "optimizer", "scheduler")
# of this machine and this command, never of the file
OURS = {"root": "${oc.env:FLOWTRAIN_DATA,data}", "path": None, "download": True}
DROPPED = ("devices", "allow", "dist", "job_timeout")
UNSET = {"init": None, "resume": False}


def load(path: str, weights: str = "auto", allow=()):
    """The flow of a run directory or a checkpoint, on the CPU and in evaluation mode.

    ``weights``: ``ema``, ``raw``, or ``auto``, the averaged ones where there are any. ``allow``: names of modules
    whose own classes the checkpoint may name.
    """
    from flowtrain.runtime import checkpoint
    from flowtrain.runtime.checkpoint import load_weights

    file = runs.checkpoint_in(path, "load")
    flow = build_flow(OmegaConf.create({**embedded(file, allow), "allow": list(allow)}), "cpu")
    load_weights(flow, checkpoint.read(file), weights)
    return flow.eval()


def embedded(file: Path, allow=()) -> dict:
    """The configuration in a checkpoint, checked as plain data before anything is made of it; then what it describes
    is built without memory and compared with the weights that the file holds.

    Raises:
        FlowtrainError: the file is damaged, no checkpoint of flowtrain, or names what is not allowed.
    """
    from flowtrain.config.allow import check_targets
    from flowtrain.runtime import checkpoint

    state = checkpoint.read(file, mmap=True)
    try:
        config = state.get("config")
        _check_plain(config)
        check_targets(config, allow)
        settled(ROOTS["train"], config, complete=False)
        _check_built(config, state, allow)
    except Exception as error:  # whatever a stranger's values make of a constructor
        text = " ".join(str(error).split()) or type(error).__name__
        text = "".join(letter if letter.isprintable() else "?" for letter in text)  # none of them moves a cursor
        raise FlowtrainError(f"{file}: its configuration is refused: {text[:300]}") from error
    return config


def _check_plain(config) -> None:
    if not isinstance(config, dict):
        raise ValueError("it is no mapping")
    for key in config:
        if key not in known_keys("train") and not (isinstance(key, str) and re.fullmatch(r"\w+", key) and is_part(key)):
            raise ValueError(f"unknown key {str(key)[:60]}")
    if not all(isinstance(config.get(key), dict) for key in NEEDED):
        raise ValueError(f"it lacks one of {', '.join(NEEDED)}")
    todo, size = [(config, 1)], 0
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"it has a key {key!r:.60}, no text")
                if key.startswith("_") and key not in ("_target_", "_partial_"):  # what else Hydra obeys
                    raise ValueError(f"it has a key {key[:60]}")
            children = [*value.keys(), *value.values()]
        else:
            children = value if isinstance(value, list) else []
        size += len(children) + (len(value) // 100 if isinstance(value, str) else 0)
        if depth > MAX_DEPTH or size > MAX_SIZE:
            raise ValueError("it is too deep or too large")
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise ValueError(f"it refers to something: {value[:60]}")
        if isinstance(value, str) and not "".join(value.split()).isprintable():
            raise ValueError(f"it holds control characters: {value[:60]}")
        if not isinstance(value, dict | list | str | int | float | None):
            raise ValueError(f"it holds a {type(value).__name__}")
        todo += [(child, depth + 1) for child in children]


def _check_built(config: dict, state: dict, allow) -> None:
    """Build the flow on the meta device, where a size costs nothing, and the data set, which opens no file: ValueError
    where they are none, or where the flow has other weights than the file, and so could ask for any amount of memory.
    """
    from flowtrain.data import Columns
    from flowtrain.data.dataset import Dataset
    from flowtrain.flow import Flow

    held = [state.get("model"), state.get("ema", "missing") or {}]
    if not all(isinstance(weights, dict) for weights in held):
        raise ValueError("the file has no weights")
    if any(abs(number) > MAX_NUMBER for number in _whole_numbers(config["model"])):
        raise ValueError(f"model holds a number beyond {MAX_NUMBER:,}")
    cfg = OmegaConf.create({**config, "allow": list(allow)})
    with _modules_at_most(10_000 + 20 * len(held[0])):
        flow = build_flow(cfg, "meta")
    if not isinstance(flow, Flow):
        raise ValueError("model is no flow")
    if "path" in cfg.dataset:
        cfg.dataset.path = None  # a stranger's: the description must not come from that file
    data = build(cfg.dataset, allow=allow)
    if not isinstance(data, Dataset):
        raise ValueError("dataset is no data set")
    if state.get("columns"):
        data.use_columns(Columns.from_record(state["columns"]))
    shape = data.spec.shape
    if shape != tuple(flow.shape) or not 0 < flow.dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"the flow is of shape {list(flow.shape)}: the data are of shape {list(shape)}")
    wanted = flow.state_dict()
    for weights in filter(None, held):
        for name in sorted({*wanted} ^ {*weights}, key=str):
            raise ValueError(f"it does not fit the weights: only one of them has {name}")
        for name, value in weights.items():
            if (said := _said(value)) != _said(wanted[name]):
                raise ValueError(f"it does not fit the weights: {name} is {said}, not {_said(wanted[name])}")


def _whole_numbers(node) -> Iterator[int]:
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _whole_numbers(child)
    elif isinstance(node, int):
        yield node


def _said(value) -> str:
    """The type and shape of a tensor in words."""
    import torch

    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


@contextmanager
def _modules_at_most(most: int) -> Iterator[None]:
    """ValueError as soon as what is built within it has more parts: a few words may ask for any number of layers."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def see(*_) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError("it describes far more layers than there are weights")

    hook = register_module_module_registration_hook(see)
    try:
        yield
    finally:
        hook.remove()


def as_option(group: str, file: Path, allow=()) -> str:
    """Store a checkpoint's configuration as an option of the config group ``group``; the option's name.

    Then Hydra's whole grammar applies to it: overrides, sweeps over several checkpoints, ``--cfg``, completion.
    """
    from hydra.core.config_store import ConfigStore

    config = {key: value for key, value in embedded(file, allow).items() if key not in DROPPED} | UNSET
    config["dataset"] |= {key: value for key, value in OURS.items() if key in config["dataset"]}
    # a path may hold what OmegaConf would take for an interpolation
    config[group] = str(file).replace("${", "\\${")
    run = runs.run_of(file)
    if run:
        _check_links(run)
    else:
        run = file.parent
    if group != "resume":
        config["run_dir"] = str(run).replace("${", "\\${")
    name = re.sub(r"[^\w.-]", "_", "_".join([*run.parts[-2:], file.stem]))
    known = ConfigStore.instance().repo.get(group, {})
    while f"{name}.yaml" in known:
        name += "_"
    ConfigStore.instance().store(group=group, name=name, node=OmegaConf.create(config), package="_global_")
    return name


def _check_links(run: Path) -> None:
    """Commands write into a run directory: refuse one from which a link leads elsewhere."""
    for folder, folders, files in os.walk(run):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(folder, name)):
                raise FlowtrainError(f"{os.path.join(folder, name)} is a link: a run directory holds none")


def stub(group: str) -> str:
    """An option that stands for a checkpoint not chosen yet, for ``--help`` and completion."""
    from hydra.core.config_store import ConfigStore

    node = {group: "PATH"}
    ConfigStore.instance().store(group=group, name="PATH", node=node, package="_global_")
    return "PATH"
