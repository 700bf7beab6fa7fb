"""From a checkpoint back to a configuration that Hydra composes on, and to a flow."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf

from flowtrain import runs
from flowtrain.config import build, is_part
from flowtrain.errors import FlowtrainError, Refused
from flowtrain.settings import known_keys

RESTORED = ("eval", "sample", "check", "score", "resume")  # root configurations on top of a checkpoint's
MAX_DEPTH, MAX_SIZE = 40, 50_000  # of a configuration: nesting; keys, items and characters of its texts / 100
# of this machine and this command, never of the file
OURS = {"root": "${oc.env:FLOWTRAIN_DATA,data}", "path": None, "download": True}
DROPPED = ("devices", "allow")


def load(path: str, weights: str = "auto", allow=()):
    """The flow of a run directory or a checkpoint, on the CPU and in evaluation mode.

    ``weights``: ``ema``, ``raw``, or ``auto``, the averaged ones where there are any. ``allow``: names of modules
    whose own classes the checkpoint may name.
    """
    from flowtrain.assemble import load_weights
    from flowtrain.engine import checkpoint

    file = runs.checkpoint_in(path, "load")
    flow = build(OmegaConf.create(embedded(file, allow)).model.flow, allow=allow)
    load_weights(flow, checkpoint.read(file), weights)
    return flow.eval()


def embedded(file: Path, allow=()) -> dict:
    """The configuration in a checkpoint, checked as plain data before anything is made of it.

    Raises:
        FlowtrainError: the file is damaged, no checkpoint of flowtrain, or names what is not allowed.
    """
    from flowtrain.allow import check_targets
    from flowtrain.engine import checkpoint

    config = checkpoint.read_config(file)
    try:
        _check_plain(config)
        check_targets(config, allow)
    except (Refused, ValueError) as error:
        raise FlowtrainError(f"{file}: its configuration is refused: {error}") from error
    return config


def _check_plain(config) -> None:
    if not isinstance(config, dict):
        raise ValueError("it is no mapping")
    for key in config:
        if key not in known_keys("train") and not (isinstance(key, str) and re.fullmatch(r"\w+", key) and is_part(key)):
            raise ValueError(f"unknown key {key}")
    todo, size = [(config, 1)], 0
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict):
            children = [*value.keys(), *value.values()]
        else:
            children = value if isinstance(value, list) else []
        size += len(children) + (len(value) // 100 if isinstance(value, str) else 0)
        if depth > MAX_DEPTH or size > MAX_SIZE:
            raise ValueError("it is too deep or too large")
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"it refers to something: {value[:60]}")
        if not isinstance(value, dict | list | str | int | float | None):
            raise ValueError(f"it holds a {type(value).__name__}")
        todo += [(child, depth + 1) for child in children]


def as_option(group: str, file: Path, allow=()) -> str:
    """Store a checkpoint's configuration as an option of the config group ``group``; the option's name.

    Then Hydra's whole grammar applies to it: overrides, sweeps over several checkpoints, ``--cfg``, completion.
    """
    from hydra.core.config_store import ConfigStore

    config = {key: value for key, value in embedded(file, allow).items() if key not in DROPPED}
    needed = ("model", "dataset", "trainer", "optimizer", "scheduler")
    if not all(isinstance(config.get(key), dict) for key in needed):
        raise FlowtrainError(f"{file}: its configuration lacks one of {', '.join(needed)}")
    config["dataset"] |= {key: value for key, value in OURS.items() if key in config["dataset"]}
    # a path may hold what OmegaConf would take for an interpolation
    config[group] = str(file).replace("${", "\\${")
    if group == "ckpt":
        config["run_dir"] = str(runs.run_of(file) or file.parent).replace("${", "\\${")
    run = runs.run_of(file) or file.parent
    name = re.sub(r"[^\w.-]", "_", "_".join([*run.parts[-2:], file.stem]))
    known = ConfigStore.instance().repo.get(group, {})
    while f"{name}.yaml" in known:
        name += "_"
    ConfigStore.instance().store(group=group, name=name, node=OmegaConf.create(config), package="_global_")
    return name


def stub(group: str) -> str:
    """An option that stands for a checkpoint not chosen yet, for ``--help`` and completion."""
    from hydra.core.config_store import ConfigStore

    node = {group: "PATH"}
    ConfigStore.instance().store(group=group, name="PATH", node=node, package="_global_")
    return "PATH"
