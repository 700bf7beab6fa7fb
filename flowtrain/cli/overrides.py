"""A command line, checked before anything is created: each key exists, each option exists, each value has its type.

Hydra itself refuses an unknown key on the command line, but merges one in an experiment or a user's file silently.
"""

from __future__ import annotations

import difflib
import re
from argparse import Namespace
from dataclasses import fields

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowtrain.cli.options import hide_shared_files
from flowtrain.config import runs
from flowtrain.config.compose import conf_dir, is_part, settle
from flowtrain.config.schema import RESTORED, ROOTS, Train, known_keys, shown, typed_keys
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import distributed

# what a command that does not train reads of a run's own keys
READ_BY_ALL = ("seed", "devices", "on_bad", "trainer.workers", "allow", "dist.timeout_s", "job_timeout")
OF_TRAINING = {item.name for item in fields(Train)} - {*READ_BY_ALL, "dist", "model", "dataset"}
# what a checkpoint leaves open of its data: where they lie
PLACES = ("dataset.root", "dataset.path", "dataset.download")


def check(command: str, config_name: str, args: Namespace, multirun: bool) -> None:
    """Compose every job of a command line and raise UsageError, in one line, at the first thing that is wrong."""
    hide_shared_files()
    path = create_config_search_path(str(conf_dir()))
    if args.config_dir:
        from pathlib import Path

        if not Path(args.config_dir).is_dir():
            raise UsageError(f"--config-dir {args.config_dir}: no such directory")
        path.prepend("command-line", f"file://{Path(args.config_dir).absolute()}")
    loader = ConfigLoaderImpl(path)
    for overrides in _jobs(args.overrides, multirun):
        _Job(loader, command, args.config_name or config_name, overrides).check()


def _jobs(overrides: list[str], multirun: bool) -> list[list[str]]:
    parsed = parse(overrides)
    if not multirun:
        for item in parsed:
            if item.is_sweep_override():
                key = item.key_or_group
                raise UsageError(
                    f"'{item.input_line}' holds several values: add --multirun, or write {key}=[a,b] for a list"
                )
        return [overrides]
    try:
        return BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException:  # a sweep of another sweeper's kind: the rest can be checked
        return [[item.input_line for item in parsed if not item.is_sweep_override()]]


def check_names(command: str, overrides: list[str]) -> None:
    """Refuse a word whose key no checkpoint can have, before one is opened, which needs torch."""
    typed = typed_keys(ROOTS[command])
    groups = [folder.name for folder in conf_dir().iterdir() if folder.is_dir()]
    names = [*typed, *PLACES, *groups]
    for item in parse(overrides):
        key = item.key_or_group
        root = re.split("[./]", key)[0]
        if item.is_hydra_override() or root == "hydra":
            continue
        if _is_fixed(command, key):
            raise _fixed(key)
        has_schema = any(name.startswith(f"{root}.") for name in typed)
        if root not in names or has_schema and key not in typed:
            raise UsageError(f"no key '{key}'; {_suggestion(key, names)}".rstrip("; "))


def parse(overrides: list[str]) -> list:
    """Hydra's parse of ``key=value`` words."""
    for word in overrides:
        try:
            OverridesParser.create().parse_override(word)
        except HydraException as error:
            if "=" not in word and not word.startswith("~"):
                raise UsageError(f"'{word}' is not key=value") from None
            reason = str(error).splitlines()[0]
            raise UsageError(f"cannot read '{word}': {reason} (quote special characters: \"key='a,b'\")") from None
    return OverridesParser.create().parse_overrides(overrides)


class _Job:
    """One composition, checked from its parts: files first, then the command line's own words, then the whole."""

    def __init__(self, loader, command: str, config_name: str, overrides: list[str]):
        self.loader, self.command, self.config_name, self.overrides = loader, command, config_name, overrides
        self.words = parse(overrides)
        self.restored = config_name in RESTORED

    def check(self) -> None:
        self._check_options()
        try:
            defaults = self.loader.compute_defaults_list(self.config_name, self.overrides, RunMode.RUN)
            self._check_files(defaults)
            self._check_words(defaults)
            cfg = self.loader.load_configuration(self.config_name, self.overrides, RunMode.RUN)
        except MissingConfigException as error:
            raise self._missing(error) from error
        except (
            HydraException,
            OmegaConfBaseException,
            yaml.YAMLError,
            ValueError,
        ) as error:  # ~model=0 is a ValueError
            raise one_line(error) from error
        self._check_whole(cfg)

    # -- the options of groups

    def _check_options(self) -> None:
        for item in self.words:
            group, value = item.key_or_group, item.value()
            if item.is_delete() or not self.loader.repository.group_exists(group):
                continue
            if self.restored and (group in ("model", "dataset", "experiment") or is_part(group)):
                raise _fixed(group)
            options = self.loader.get_group_options(group)
            if value is None:
                raise UsageError(f"{group}=null: choose one of {', '.join(options)}")
            choices = value if isinstance(value, list) else [value]
            if not isinstance(value, Sweep) and not group.startswith("hydra/"):
                for choice in choices:
                    if shown(choice) not in options:
                        raise _no_option(group, shown(choice), options)

    def _missing(self, error: MissingConfigException) -> UsageError:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if group == "hydra/launcher":
            return UsageError(f"launcher={name}: needs the extra packages of pip install 'flowtrain[launchers]'")
        return _no_option(group, name, error.options or []) if group else one_line(error)

    # -- the files

    def _check_files(self, defaults) -> None:
        """Each key of a file that is merged over the whole tree must exist in the tree without that file."""
        overlays = [item for item in defaults.defaults if self._is_overlay(item)]
        _, repo = self.loader._parse_overrides_and_create_caching_repo(self.config_name, self.overrides)
        kept = [item for item in defaults.defaults if item not in overlays]
        tree = self.loader._compose_config_from_defaults_list(kept, repo)
        for item in overlays:
            content = OmegaConf.to_container(repo.load_config(item.config_path).config, resolve=False)
            for key in ("hydra", "defaults"):
                content.pop(key, None)
            if "allow" in content:
                raise UsageError(f"{item.config_path}.yaml: allow= comes from the command line only")
            _compare(content, tree, f"{item.config_path}.yaml: ")

    def _is_overlay(self, item) -> bool:
        top = item.config_path.split("/")[0]
        parts = ("base", "train", "hydra", "ckpt", "resume", "replay")
        return not item.primary and not item.package and top not in parts

    # -- the words of the command line

    def _check_words(self, defaults) -> None:
        _, repo = self.loader._parse_overrides_and_create_caching_repo(self.config_name, self.overrides)
        tree = self.loader._compose_config_from_defaults_list(defaults.defaults, repo)
        for item in defaults.config_overrides:
            key = item.key_or_group
            if item.package is not None or item.is_hydra_override():
                continue
            if self.restored and _is_fixed(self.command, key):
                raise _fixed(key)
            if not (item.is_add() or item.is_force_add()):
                _exists(key, tree, self._names(tree), "")
            if (
                self.restored
                and self.command != "train"
                and key.split(".")[0] in OF_TRAINING
                and key not in READ_BY_ALL
            ):
                raise UsageError(f"{key}: {self.command} does not train, so it would change nothing")
            if not item.is_delete():
                _check_kind(key, item.value(), OmegaConf.select(tree, key, throw_on_missing=False), "")

    def _names(self, tree) -> list[str]:
        """Every key of the tree, and every group."""
        return [*_keys(tree), *self.loader.get_group_options("", ObjectType.GROUP)]

    # -- the whole

    def _check_whole(self, cfg: DictConfig) -> None:
        known = known_keys(self.command)
        for key in cfg:
            if key not in known and not is_part(key) and key != "hydra":
                hint = _suggestion(key, known) or "its file needs '# @package _global_' as its first line; "
                raise UsageError(f"no key '{key}' at the root: {hint.removesuffix('; ')}")
        if not self.restored and "model" in cfg:
            _check_unused_parts(cfg, {item.key_or_group.split(".")[0] for item in self.words})
        try:
            values = settle(cfg, self.command, self.restored)
        except OmegaConfBaseException as error:
            raise one_line(error) from error
        count = distributed.processes(values["devices"])
        if self.command == "train":
            _check_shares(values["batch_size"], count, values["trainer"]["accumulate"])
        if values.get("init"):
            runs.checkpoint_in(values["init"], "init")


def _is_fixed(command: str, key: str) -> bool:
    """Whether a key is of what a checkpoint decides: the flow, its data and, once it is trained, how it learnt."""
    root = key.split(".")[0]
    learnt = command != "train" and root in ("optimizer", "scheduler")
    return (root in ("model", "dataset") or is_part(root) or learnt) and key not in PLACES


def _fixed(key: str) -> UsageError:
    return UsageError(f"{key} is fixed by the checkpoint; only {', '.join(PLACES)} can be given")


def _no_option(group: str, name: str, options) -> UsageError:
    return UsageError(f"{group}={name}: no such option; {_suggestion(name, options)}there are {', '.join(options)}")


def one_line(error: BaseException) -> FlowtrainError:
    """Hydra's or OmegaConf's error as ours."""
    seen = error
    while seen is not None:
        if isinstance(seen, FlowtrainError):
            return seen
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, yaml.YAMLError):
        return UsageError(f"a YAML file cannot be read: {' '.join(str(error).split())}")
    no_place = re.search(r"Could not override '(.*?)'.*No match in the defaults list", str(error))
    if no_place:
        return UsageError(
            f"{no_place[1]}: nothing here takes it; --cfg job shows what the other choices leave to choose"
        )
    words = [line.strip().rstrip(".") for text in (error, error.__cause__) if text for line in str(text).splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=", "Search path", "provider=", "To append")
    kept = [word for word in words if word and not word.startswith(noise)]
    return UsageError("; ".join(dict.fromkeys(kept)) or type(error).__name__)


def _suggestion(name: str, options) -> str:
    """ "did you mean 'x'? ", or nothing."""
    near = difflib.get_close_matches(name, list(options), 1)
    if not near:  # trainer.lr or lr for optimizer.lr
        last = name.rpartition(".")[2]
        near = [key for key in options if key.rpartition(".")[2] == last][:1]
    return f"did you mean '{near[0]}'? " if near else ""


def _keys(node, prefix: str = "") -> list[str]:
    """Every dotted key below a node, outermost first."""
    here = [(f"{prefix}{key}", value) for key, value in node.items_ex(resolve=False) if key != "hydra"]
    inner = [name for key, value in here if _is_mapping(value) for name in _keys(value, f"{key}.")]
    return [key for key, _ in here] + inner


def _is_mapping(node) -> bool:
    return (
        isinstance(node, DictConfig) and not node._is_none() and not node._is_missing() and not node._is_interpolation()
    )


def _exists(key: str, tree: DictConfig, names, where: str) -> None:
    node = tree
    for part in key.split("."):
        if isinstance(node, DictConfig) and _is_mapping(node):
            if part not in node:
                raise UsageError(f"{where}no key '{key}'; {_suggestion(key, names)}".rstrip("; "))
            node = node._get_node(part)
        else:  # inside a list or a reference: Hydra and the constructors know
            return


def _compare(content: dict, tree: DictConfig, where: str, prefix: str = "") -> None:
    """Refuse what ``content`` would add to ``tree``, except a part of its own: a mapping with a _target_."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        old = OmegaConf.select(tree, key, throw_on_missing=False)
        new_part = isinstance(value, dict) and "_target_" in value
        if not (new_part and old is None):
            _exists(key, tree, _keys(tree), where)
        if isinstance(value, dict) and isinstance(old, DictConfig):
            _compare(value, tree, where, f"{key}.")
        else:
            _check_kind(key, value, old, where)


def _check_kind(key: str, new, old, where: str) -> None:
    """Refuse a value whose kind is not that of the value it replaces; what the root's keys are, settings says."""
    if "." not in key or new is None or isinstance(new, str) and "${" in new:
        return
    if isinstance(old, DictConfig) and not isinstance(new, dict):
        raise UsageError(
            f"{where}{key}={shown(new)}: {key} is a mapping; name a key of it, as in {key}.{next(iter(old), 'key')}"
        )
    if isinstance(old, ListConfig) and not isinstance(new, list):
        raise UsageError(f"{where}{key}={shown(new)}: must be a list, such as [a,b]")
    if isinstance(new, dict | list):
        return
    if isinstance(old, bool):
        wanted, fits = "true or false", isinstance(new, bool)
    elif isinstance(old, int | float):
        wanted, fits = "a number", isinstance(new, int | float) and not isinstance(new, bool)
    else:
        return
    if not fits:
        raise UsageError(f"{where}{key}={shown(new)}: must be {wanted}, as in {key}={shown(old)}")


def _check_shares(batch_size: int, processes: int, accumulate: int) -> None:
    share = processes * accumulate
    if batch_size % share:
        raise UsageError(
            f"batch_size={batch_size}: does not divide by {processes} processes × trainer.accumulate={accumulate}; "
            f"batch_size={max(1, round(batch_size / share)) * share} does"
        )


def _check_unused_parts(cfg: DictConfig, named: set[str]) -> None:
    """Refuse a part that the command line names and the model does not use: it would change nothing."""
    content = OmegaConf.to_container(cfg, resolve=False)
    model = content["model"]
    for part in filter(is_part, named):
        if part in model:
            raise UsageError(f"{part}: this model sets it itself, to {shown(model[part])}")
        if "layers" in model and part not in ("base", "preprocess"):  # of model=custom
            used = {key for name, node in content.items() for key in _references(node, (name,)) if name != part}
            if not any(key == part or key.startswith(f"{part}.") for key in used):
                raise UsageError(f"{part}: no layer of this model refers to it, so it would change nothing")


def _references(value, path: tuple):
    """The dotted keys that ``${…}`` in ``value``, found at ``path``, refer to."""
    if isinstance(value, dict | list):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _references(child, (*path, str(name)))
    elif isinstance(value, str):
        for dots, key in re.findall(r"\$\{(\.*)([A-Za-z_][\w.]*)", value):
            yield ".".join((*path[: -len(dots)], key)) if dots else key
