"""A command line, checked before anything is created: each key exists, each option exists, each value has its type."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import yaml
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowtrain.cli import directories, keys
from flowtrain.cli.hydra_internals import Composition, Loader, is_search
from flowtrain.cli.messages import no_option, suggest, usage_error
from flowtrain.cli.overrides import parse, split_jobs
from flowtrain.commands import CHECKPOINT_KEYS, Command
from flowtrain.config import runs
from flowtrain.config.compose import conf_dir, is_part, make_config
from flowtrain.config.conversion import dotted_keys, format_value, key_names
from flowtrain.config.schema import JobConfig, TrainConfig, check_batch_size
from flowtrain.errors import UsageError
from flowtrain.runtime import distributed

# keys of a run that every command reads; the others of TrainConfig matter to training alone
READ_BY_ALL = ("seed", "devices", "threads", "on_bad", "trainer.workers", "allow", "dist.timeout_s", "job_timeout")
OF_TRAINING = {*key_names(TrainConfig)} - {*READ_BY_ALL, "dist", "model", "dataset", "target", "objective"}
# keys of the data set that a checkpoint does not decide: where the data lie
PLACES = ("dataset.root", "dataset.path", "dataset.download")
# groups of which a checkpoint has chosen an option
CHOSEN = ("model", "dataset", "target", "objective", "experiment", "optimizer", "scheduler", "logger")


class Checked(NamedTuple):
    """A command line without mistakes.

    Attributes:
        is_dry: whether its jobs are dry runs.
        config: what Hydra would compose for its job; None for a sweep.
    """

    is_dry: bool
    config: DictConfig | None


def check(command: Command, config_name: str, args: Namespace, multirun: bool) -> Checked:
    """Compose every job of a command line. Raises UsageError, in one line, at the first mistake."""
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UsageError(f"--config-dir {args.config_dir}: no such directory")
    loader, name, dry = Loader(args.config_dir), args.config_name or config_name, set()
    words, search = args.overrides, False
    if multirun or any(item.key_or_group == "sweep" for item in parse(words)):
        hydra = _Job(loader, command, name, words).hydra_node()
        search = hydra is None or is_search(hydra.sweeper)
        if hydra is not None:
            multirun = multirun or hydra.mode == RunMode.MULTIRUN
            words = [*(f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()), *words]
    for job in split_jobs(words, multirun, search):
        cfg, config = _Job(loader, command, name, job).check()
        dry.add(command.trains and config.dry_run)
    if len(dry) > 1:
        raise UsageError("dry_run=true,false: the jobs of a sweep are all dry runs, or none is")
    return Checked(True in dry, None if multirun or cfg.hydra.mode == RunMode.MULTIRUN else cfg)


def check_names(command: Command, words: list[str]) -> None:
    """Refuse a word whose key no checkpoint can have, before one is opened, which needs torch."""
    declared = dotted_keys(command.config)
    groups = [folder.name for folder in conf_dir().iterdir() if folder.is_dir()]
    known = [*declared, *PLACES, *groups]
    for item in parse(words):
        key = item.key_or_group
        root = re.split("[./]", key)[0]
        if item.is_hydra_override() or root == "hydra":
            continue
        if _is_fixed(command, key):
            raise _refusal(command, key)
        has_schema = any(name.startswith(f"{root}.") for name in declared)
        if root not in known or has_schema and key not in declared:
            raise UsageError(f"no key '{key}'; {suggest(key, known)}".rstrip("; "))


class _Job:
    """One job: first its options, then its files, then the words of the command line, then the whole tree."""

    def __init__(self, loader: Loader, command: Command, config_name: str, words: list[str]):
        self.loader, self.command, self.config_name, self.words = loader, command, config_name, words
        self.parsed = parse(words)
        self.restored = command.opens_checkpoint(config_name)

    def hydra_node(self) -> DictConfig | None:
        """Hydra's own settings, without what a sweep varies; None where :meth:`check` will find a mistake."""
        fixed = [item.input_line for item in self.parsed if not item.is_sweep_override()]
        try:
            return Composition(self.loader, self.config_name, fixed).whole().hydra
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError):
            return None

    def check(self) -> tuple[DictConfig, JobConfig]:
        """The tree that Hydra composes, and the configuration that the job receives."""
        self._check_options()
        try:
            composition = Composition(self.loader, self.config_name, self.words)
            self._check_files(composition)
            self._check_values(composition)
            cfg = composition.whole()
        except MissingConfigException as error:
            raise self._missing(error) from error
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise usage_error(error) from error  # ValueError: of ~model=0
        return cfg, self._check_whole(cfg)

    def _check_options(self) -> None:
        for item in self.parsed:
            group, value = item.key_or_group, item.value()
            if item.is_delete() and group in key_names(self.command.config) and self.loader.group_exists(group):
                raise UsageError(f"~{group}: cannot be left out; choose one of {', '.join(self.loader.options(group))}")
            if item.is_delete() or not self.loader.group_exists(group):
                continue
            if self.restored and (group in CHOSEN or is_part(group)):
                raise _refusal(self.command, group)
            options = self.loader.options(group)
            if value is None:
                raise UsageError(f"{group}=null: choose one of {', '.join(options)}")
            choices = value if isinstance(value, list) else [value]
            if not isinstance(value, Sweep) and not group.startswith("hydra/"):
                for choice in choices:
                    if format_value(choice) not in options:
                        raise no_option(group, format_value(choice), options)

    def _missing(self, error: MissingConfigException) -> Exception:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if group == "hydra/sweeper" and name == "optuna":
            return UsageError("hydra/sweeper=optuna: needs the extra packages of pip install 'flowtrain[optuna]'")
        if group == "hydra/launcher":
            return UsageError(f"launcher={name}: needs the extra packages of pip install 'flowtrain[launchers]'")
        return no_option(group, name, error.options or []) if group else usage_error(error)

    def _check_files(self, composition: Composition) -> None:
        """Each key of a file that is merged over the whole tree must exist in the tree without that file."""
        ours = ("hydra", *CHECKPOINT_KEYS)
        overlays = [file for file in composition.overlays() if file.config_path.split("/")[0] not in ours]
        if not overlays:
            return
        tree = composition.tree(without=overlays)
        for file in overlays:
            content = composition.content(file)
            content.pop("hydra", None)
            if "allow" in content:
                raise UsageError(f"{file.config_path}.yaml: allow= comes from the command line only")
            keys.check_file(content, tree, f"{file.config_path}.yaml: ")

    def _check_values(self, composition: Composition) -> None:
        tree = composition.tree()
        content = keys.plain(tree)
        known = [*keys.names(content), *self.loader.groups()]
        for item in composition.values:
            key = item.key_or_group
            if item.package is not None or item.is_hydra_override():
                continue
            if self.restored and _is_fixed(self.command, key):
                raise _refusal(self.command, key)
            if not (item.is_add() or item.is_force_add()) or key.startswith(keys.OPEN):
                keys.check_exists(key, content, known)
            if self.restored and _changes_nothing(self.command, key):
                raise UsageError(f"{key}: this command does not train, so it would change nothing")
            if item.is_delete() and key in dotted_keys(self.command.config):
                raise UsageError(f"~{key}: cannot be left out")
            if not item.is_delete():
                keys.check_kind(key, item.value(), OmegaConf.select(tree, key, throw_on_missing=False))

    def _check_whole(self, cfg: DictConfig) -> JobConfig:
        known = key_names(self.command.config)
        for key in cfg:
            if key not in known and not is_part(key) and key != "hydra":
                hint = suggest(key, known) or "its file needs '# @package _global_' as its first line; "
                raise UsageError(f"no key '{key}' at the root: {hint.removesuffix('; ')}")
        if not self.restored:
            for item in self.parsed:
                _check_part(item.key_or_group.split(".")[0], cfg)
        try:
            config = make_config(cfg, self.command.config, restored=self.restored)
        except OmegaConfBaseException as error:
            raise usage_error(error) from error
        directories.check(self.command, cfg)
        processes = distributed.processes(config.devices)
        if self.command.trains:
            if config.batch_size != "auto" and not config.smoke:
                check_batch_size(config.batch_size, processes, config.trainer.accumulate)
            if config.init:
                runs.checkpoint_in(config.init, "init")
            if self.command.repeats and config.resume:
                raise UsageError("resume: flowtrain rerun starts anew; flowtrain train resume=PATH continues a run")
            if config.dry_run:
                directories.check_place(cfg)
        return config


def _check_part(part: str, cfg: DictConfig) -> None:
    """Refuse a part of the command line that would change nothing: the model sets it, or no layer refers to it."""
    model = cfg.get("model") or {}
    if not is_part(part):
        return
    if part in model:
        what = f"takes no {part}" if model[part] is None else f"sets {part} itself"
        raise UsageError(f"model={cfg.hydra.runtime.choices.model} {what}")
    if "layers" in model and part not in ("base", "preprocess", "dequantize", "embedding"):
        others = {name: node for name, node in cfg.items_ex(resolve=False) if name not in (part, "hydra")}
        if f"${{{part}" not in OmegaConf.to_yaml(OmegaConf.create(others)):
            raise UsageError(f"{part}: no layer of this model refers to it, so it would change nothing")


def _is_fixed(command: Command, key: str) -> bool:
    """Whether the checkpoint decides a key: the flow, its data and, unless the command trains, its optimizer."""
    root = key.split(".")[0]
    if command.repeats:  # a new run, of the same data
        return root == "dataset" and key not in PLACES
    of_training = not command.trains and root in ("optimizer", "scheduler", "logger")
    return (root in ("model", "dataset", "target", "objective") or is_part(root) or of_training) and key not in PLACES


def _changes_nothing(command: Command, key: str) -> bool:
    return not command.trains and key.split(".")[0] in OF_TRAINING and key not in READ_BY_ALL


def _refusal(command: Command, key: str) -> UsageError:
    if command.repeats:
        why = "a rerun keeps the run's data and choices, and flowtrain train starts another run"
        return UsageError(f"{key} is fixed by the checkpoint: {why}")
    if command.trains and key == "logger":
        return UsageError("logger: resume=PATH keeps those of the run; its own command with resume=true takes others")
    if command.trains and key in ("optimizer", "scheduler"):
        return UsageError(f"{key}: resume=PATH keeps that of the run; single keys may be given: {key}.KEY=VALUE")
    return UsageError(f"{key} is fixed by the checkpoint; of the model and its data, only {', '.join(PLACES)} are not")
