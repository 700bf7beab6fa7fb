"""What a run's preset composes by itself, to show what a run changed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf.errors import OmegaConfBaseException

from flowtrain.config.build import model_name
from flowtrain.config.compose import conf_dir, train_config
from flowtrain.config.conversion import to_dict
from flowtrain.config.schema import TrainConfig
from flowtrain.errors import FlowtrainError

CHOICES = ("experiment", "model", "dataset")  # the groups that name a preset


@dataclass(frozen=True)
class Preset:
    """Attributes:
    command: that composes it.
    config: what it composes, as plain values; None where that cannot be found out.
    note: why, or what else must be said; or "".
    """

    command: str
    config: dict | None
    note: str = ""


def preset_of(config: TrainConfig, overrides: list[str] | None, run: Path | None) -> Preset:
    """The preset of a run: its experiment, model and dataset without the other words of its command line.

    Args:
        overrides: the words of its command line; None: of a lone checkpoint, whose model and dataset are then guessed
            by their names.
        run: its directory, which remembers the folders of options of the user's own.
    """
    note = ""
    if overrides is None:
        words = [f"model={model_name(config)}", f"dataset={config.dataset.get('name')}"]
        words = [word for word in words if (conf_dir() / word.replace("=", "/")).with_suffix(".yaml").is_file()]
        note = "The command line is not known: the preset is that of the model and the data set by their names."
    else:
        words = [word for word in overrides if word.partition("=")[0] in CHOICES]
    words += ["smoke=true"] if config.smoke else []
    command = shlex.join(["flowtrain", "train", *words])
    folders = [] if run is None else _config_dirs(run / ".hydra" / "hydra.yaml")
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []
    job = get_gh_backup()  # this may run inside a job, whose Hydra it must leave as it is
    GlobalHydra.instance().clear()
    try:
        return Preset(command, _compose(*words, *search), note)
    except (FlowtrainError, HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())[:200]
        return Preset(command, None, f"The preset, {command}, cannot be composed here ({reason}).")
    finally:
        restore_gh_from_backup(job)


@lru_cache(maxsize=16)
def _compose(*words: str) -> dict:
    return to_dict(train_config(*words))


def _config_dirs(record: Path) -> list[str]:
    """The folders that --config-dir and hydra.searchpath named, by Hydra's record of a run."""
    try:
        sources = yaml.safe_load(record.read_text())["hydra"]["runtime"]["config_sources"]
        own = ("command-line", "hydra.searchpath in command-line")
        return [source["path"] for source in sources if source["provider"] in own and Path(source["path"]).is_dir()]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return []
