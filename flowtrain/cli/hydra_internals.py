"""All uses of Hydra's private parts. tests/test_hydra_internals.py states the behaviour that each relies on."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
from hydra import version
from hydra._internal import utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from flowtrain.config.compose import conf_dir

VERSION_BASE = "1.3"
version.setbase(VERSION_BASE)  # for what is composed before hydra.main sets it

_all_files = ConfigRepository.get_group_options


def _options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
    return [name for name in _all_files(self, group_name, results_filter) if not name.startswith("_")]


# files whose name starts with _ are shared by options and are not options: for messages, completion and sweeps alike
ConfigRepository.get_group_options = _options

QUOTED = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''  # a text in quotes, where Hydra's grammar takes one
_parse_rule = OverridesParser.parse_rule


class _QuotedKey(QuotedString):
    """A key of a mapping that is written in quotes."""

    def __hash__(self) -> int:
        return hash(self.text)


def _parse_quoted_keys(self, text: str, rule_name: str):
    """Hydra's parse of ``text``, in which keys of mappings may be quoted too: ``types={"CO(GT)": angle}``."""
    stand_in, keys = "key", {}
    while stand_in in text:
        stand_in += "_"

    def replace(found: re.Match) -> str:
        if not found[2]:
            return found[0]
        name = f"{stand_in}{len(keys)}"
        quoted = _parse_rule(self, found[1], "primitive")
        keys[name] = _QuotedKey(quoted.text, quoted.quote)
        return f"{name}:"

    plain = re.sub(rf"({QUOTED})(\s*:)?", replace, text, flags=re.DOTALL) if rule_name == "override" else text
    if not keys:
        return _parse_rule(self, text, rule_name)
    try:
        parsed = _parse_rule(self, plain, rule_name)
    except HydraException:
        return _parse_rule(self, text, rule_name)  # raises what says nothing of stand-ins

    def restore(value):
        if isinstance(value, dict):
            return {keys.get(key, key): restore(item) for key, item in value.items()}
        if isinstance(value, ChoiceSweep):
            value.list = restore(value.list)
        return [restore(item) for item in value] if isinstance(value, list) else value

    parsed._value, parsed.input_line = restore(parsed._value), text
    return parsed


OverridesParser.parse_rule = _parse_quoted_keys


def flag_parser() -> argparse.ArgumentParser:
    """The parser of Hydra's own flags, such as ``--multirun``; all other words become its ``overrides``."""
    return utils.get_args_parser()


def run_hydra(config_name: str, argv: list[str], task, config: DictConfig | None = None) -> None:
    """Let Hydra compose ``conf/CONFIG_NAME.yaml`` and call ``task``. Errors are raised, not printed.

    Args:
        config_name, argv, task: the file, the words of the command line, and what to run.
        config: of a run that is no sweep, what :meth:`Composition.whole` gave for these words. Hydra uses it; without
            it Hydra composes the same tree two times more.
    """
    sys.argv = ["flowtrain", *argv]
    utils.run_and_report = lambda function: function()
    with nullcontext() if config is None else _composed(config):
        hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=config_name)(task)()


@contextmanager
def _composed(config: DictConfig) -> Iterator[None]:
    """Hydra composes ``config`` next, for one job; what that job composes itself is its own."""

    def load_configuration(self, *args, **kwargs) -> DictConfig:
        restore()
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.mode = RunMode.RUN
        return config

    def restore() -> None:
        Hydra.get_mode, ConfigLoaderImpl.load_configuration = before

    before = Hydra.get_mode, ConfigLoaderImpl.load_configuration
    Hydra.get_mode, ConfigLoaderImpl.load_configuration = lambda *args, **kwargs: RunMode.RUN, load_configuration
    try:
        yield
    finally:
        restore()


def before_sweeps(begin, wrap) -> None:
    """From now on, call ``begin(config)`` before the sweeper of a sweep is made, and launch its jobs by
    ``wrap(launcher, hydra_context, config)``."""

    def instantiate_sweeper(self, *, hydra_context, task_function, config):
        begin(config)
        return _make_sweeper(self, hydra_context=hydra_context, task_function=task_function, config=config)

    def instantiate_launcher(self, hydra_context, task_function, config):
        return wrap(_make_launcher(self, hydra_context, task_function, config), hydra_context, config)

    Plugins.instantiate_sweeper, Plugins.instantiate_launcher = instantiate_sweeper, instantiate_launcher


_make_sweeper, _make_launcher = Plugins.instantiate_sweeper, Plugins.instantiate_launcher


def is_sequential(launcher) -> bool:
    """Whether a launcher runs one job after another."""
    return type(launcher).__name__ == "BasicLauncher"  # Hydra loads its plugins once more: the class is another


def is_search(sweeper: DictConfig) -> bool:
    """Whether a sweeper chooses values itself, as opposed to running every combination."""
    return "basic_sweeper" not in sweeper["_target_"]


def split_sweep(parsed: list) -> list[list[str]]:
    """The overrides of each job of a sweep. Raises HydraException for a sweep that needs another sweeper."""
    return BasicSweeper.split_arguments(parsed, None)[0]


class Loader:
    """Hydra's config loader over ``conf/`` and, after it, a folder of the user's."""

    def __init__(self, config_dir: str | None = None):
        path = utils.create_config_search_path(str(conf_dir()))
        if config_dir:
            place = SearchPathQuery(provider="schema")
            path.prepend("command-line", f"file://{Path(config_dir).absolute()}", anchor=place)
        self.loader = ConfigLoaderImpl(path)

    def group_exists(self, group: str) -> bool:
        return self.loader.repository.group_exists(group)

    def options(self, group: str) -> list[str]:
        return self.loader.get_group_options(group)

    def groups(self) -> list[str]:
        return self.loader.get_group_options("", ObjectType.GROUP)


class Composition:
    """One root configuration and its overrides, before and after they are merged.

    Raises:
        HydraException: a file or an option is missing, or an override does not fit.
    """

    def __init__(self, loader: Loader, config_name: str, overrides: list[str]):
        self.loader, self.config_name, self.overrides = loader.loader, config_name, overrides
        parsed, self.repository = self.loader._parse_overrides_and_create_caching_repo(config_name, overrides)
        defaults = create_defaults_list(self.repository, config_name, parsed, prepend_hydra=True, skip_missing=False)
        self.files = defaults.defaults  # in merging order
        self.values = defaults.config_overrides  # the overrides of values, not of groups

    def overlays(self) -> list:
        """The files of a group that are merged over the whole tree, such as an experiment."""
        return [file for file in self.files if not file.primary and not file.package and "/" in file.config_path]

    def content(self, file) -> dict:
        """What one file holds, without its defaults list and interpolations unresolved."""
        content = OmegaConf.to_container(self.repository.load_config(file.config_path).config, resolve=False)
        content.pop("defaults", None)
        return content

    def tree(self, without=()) -> DictConfig:
        """The files merged, before the overrides of values."""
        files = [file for file in self.files if file not in without]
        return self.loader._compose_config_from_defaults_list(files, self.repository)

    def whole(self) -> DictConfig:
        """The tree that a job receives."""
        return self.loader.load_configuration(self.config_name, self.overrides, RunMode.RUN)
