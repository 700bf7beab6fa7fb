"""Configurations and flows for tests that run no command."""

from __future__ import annotations

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from flowtrain.commands import COMMANDS
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.compose import conf_dir, train_config
from flowtrain.config.conversion import to_dict, validate
from flowtrain.data.spec import DataSpec


def compose_tree(*overrides: str):
    """Compose the configuration of train, with its interpolations unresolved."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def configuration(*overrides: str):
    """The configuration that train's main receives."""
    return train_config(*overrides)


def checkpoint_command_config(command: str, config, **keys):
    """The configuration of a command for a checkpoint of ``config``; ``keys`` are all of the command's own."""
    return validate(COMMANDS[command].config, {**to_dict(config), **keys})


def flow_of(*overrides: str, spec: DataSpec | None = None, device: str = "cpu"):
    """Build a flow for the dataset of ``overrides``, or for ``spec``."""
    config = configuration(*overrides)
    return build_flow(config, spec or build_dataset(config).spec, torch.device(device))


def options(group: str) -> list[str]:
    """The names of a configuration group, in order."""
    return sorted(path.stem for path in (conf_dir() / group).glob("[!_]*.yaml"))


def spec_of(dataset: str):
    """The specification of a dataset with default arguments."""
    target = OmegaConf.load(conf_dir() / f"dataset/{dataset}.yaml")._target_
    return get_class(target)().spec


DATASETS = [name for name in options("dataset") if name not in ("table", "arrays", "simulator", "target")]  # need yours
IMAGES = [name for name in DATASETS if spec_of(name).is_image]
VECTORS = [name for name in DATASETS if not spec_of(name).is_image]
ONLY_IMAGES = (
    "autoregressive",
    "cnf_image",
    "custom_image",
    "ffjord_image",
    "flowpp",
    "glow",
    "hybrid_image",
    "jet",
    "nsf_image",
    "pixelcnn",
    "realnvp",
    "residual_image",
    "tarflow",
)  # models


def parameters(flow) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())
