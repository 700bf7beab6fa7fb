"""Configurations composed in-process, for tests that need no command."""

from __future__ import annotations

import torch
from hydra import compose, initialize_config_dir

from flowtrain.commands import COMMANDS
from flowtrain.config.build import build_flow
from flowtrain.config.compose import conf_dir, train_config
from flowtrain.config.validation import to_dict, validate


def composed(*overrides: str):
    """The tree that train composes, interpolations and all."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def configuration(*overrides: str):
    """What train's main receives."""
    return train_config(*overrides)


def on_checkpoint(command: str, config, **keys):
    """What the main of a command that opens a checkpoint of ``config`` receives; ``keys``: its own, all of them."""
    return validate(COMMANDS[command].config, {**to_dict(config), **keys})


def flow_of(*overrides: str, device: str = "cpu"):
    return build_flow(configuration(*overrides), torch.device(device))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


IMAGES = [
    name for name in options("dataset") if "image_size: null" not in (conf_dir() / f"dataset/{name}.yaml").read_text()
]
VECTORS = sorted({*options("dataset")} - {*IMAGES, "table"})  # but a table of one's own, which needs a file
ONLY_IMAGES = ("autoregressive", "ffjord_image", "glow", "hybrid_image", "nsf_image", "realnvp")  # models


def parameters(flow) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())
