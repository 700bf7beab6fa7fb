"""Where ``conf/`` is, and how its YAML becomes the configuration that a command receives."""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import DictConfig, ListConfig, OmegaConf

from flowtrain.config import runs
from flowtrain.config.conversion import key_names, to_dict, validate
from flowtrain.config.schema import TrainConfig
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import status

_composing = threading.Lock()


def conf_dir() -> Path:
    """The checkout's ``conf/``, else the wheel's."""
    here = Path(__file__).resolve().parent.parent
    for path in (here.parent / "conf", here / "conf"):
        if (path / "train.yaml").is_file():
            return path
    raise FlowtrainError(f"conf/ is neither beside nor inside {here}: the installation is incomplete")


def is_part(key: str) -> bool:
    """Whether a root key is a part that models or data sets choose, such as ``univariate``: it has a config group."""
    return (
        key not in ("experiment", "sweep", "launcher", "hydra", *key_names(TrainConfig)) and (conf_dir() / key).is_dir()
    )


def make_config(cfg: DictConfig, schema=TrainConfig, *, restored: bool = False):
    """The ``schema`` instance that a command receives for the tree that Hydra composed.

    ``smoke=true`` is applied, except on top of a ``restored`` checkpoint, which has been shrunk already.
    """
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra", None)
    if cfg.get("smoke") is True and not restored:
        _shrink(cfg)
    return validate(schema, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def train_config(*overrides: str) -> TrainConfig:
    """What ``flowtrain train OVERRIDES`` receives, for callers outside the command line."""
    return make_config(_compose(*overrides))


def chosen_config(choices: Mapping[str, str], values: Mapping[str, Any]) -> TrainConfig:
    """What ``flowtrain train`` receives with an option of each group in ``choices`` and ``values`` of dotted keys.

    Raises:
        UsageError: there is no such option or key; the nearest one is named.
    """
    for group, option in choices.items():
        known = sorted(file.stem for file in (conf_dir() / group).glob("[!_]*.yaml"))
        if option not in known:
            near = difflib.get_close_matches(str(option), known, 3) or known
            raise UsageError(f"{group}={option}: there is no such {group}; there are {', '.join(near)}")
    cfg = copy.deepcopy(_compose_once(*(f"{group}={option}" for group, option in choices.items())))
    for key, value in values.items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        known = [one for one in node if not one.startswith("_")] if isinstance(node, DictConfig) else []
        if name not in known:
            near = difflib.get_close_matches(name, known, 3) or known or sorted(cfg)
            where = f"{parent}." if parent and known else ""
            raise UsageError(f"no key '{key}'; there are {', '.join(f'{where}{one}' for one in near)}")
        OmegaConf.update(cfg, key, value, merge=False)
    return make_config(cfg)


def _compose(*overrides: str) -> DictConfig:
    with _own_hydra(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


_compose_once = lru_cache(maxsize=64)(_compose)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Within it, Hydra's state is this thread's own; it belongs to the process, whose program may use Hydra too."""
    with _composing:
        hydra, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = hydra
            VersionBase.instance().version_base = base


_run_dirs: dict[str, str] = {}


def run_dir(path: str, resume, *, _root_) -> str:
    """A training run's directory: the one to continue, else a new one at ``path``; the same one at each reading."""
    if path not in _run_dirs:
        if resume is True:
            found = runs.find_run(to_dict(make_config(_root_)))
        else:
            found = runs.run_of(Path(resume)) if resume else None
        _run_dirs[path] = str(found) if found else runs.claim(path)
        if not found and not runs.dry_run:
            status.record_start(_run_dirs[path])
    return _run_dirs[path]


def _shrink(cfg: DictConfig) -> None:
    """``smoke=true``: reduce each key that ``conf/smoke.yaml`` names, where the configuration has it, to its size."""
    for key, size in OmegaConf.load(conf_dir() / "smoke.yaml").items():
        value = OmegaConf.select(cfg, key, default="absent")
        is_unlimited = value is None and not key.startswith("model.")  # a model's null is a size that suits the data
        if is_unlimited or value == "auto":
            OmegaConf.update(cfg, key, size)
        elif isinstance(value, int):
            OmegaConf.update(cfg, key, min(value, size))
        elif isinstance(value, ListConfig):
            OmegaConf.update(cfg, key, [min(pair) for pair in zip(value, size)])


OmegaConf.register_new_resolver("output_path", runs.output_path, replace=True)
OmegaConf.register_new_resolver("repeated_path", runs.repeated_path, replace=True)
OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
# cached: a composed configuration has one directory, however often that is read
OmegaConf.register_new_resolver("claim", runs.claim, replace=True, use_cache=True)
