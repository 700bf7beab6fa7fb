"""The behaviour of Hydra's private parts that cli/hydra_internals.py relies on: a new release may change it."""

import ast
import sys
from pathlib import Path

import pytest
from hydra._internal import utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

import flowtrain
from flowtrain.cli import hydra_internals
from flowtrain.cli.hydra_internals import Composition, Loader, flag_parser, run_hydra, split_sweep
from flowtrain.cli.overrides import parse
from flowtrain.config.compose import train_config


def test_one_file_imports_them():
    package = Path(flowtrain.__file__).parent
    users = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            module = getattr(node, "module", None) or ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith("hydra._") for name in (module, *names)):
                users.add(file)
    assert users == {Path(hydra_internals.__file__)}


def test_the_parser_separates_flags_from_overrides():
    args = flag_parser().parse_intermixed_args(["seed=2", "--multirun", "~model.steps", "--cfg", "job"])
    assert args.overrides == ["seed=2", "~model.steps"] and args.multirun and args.cfg == "job"
    assert not (args.help or args.hydra_help or args.info) and args.config_dir is None and args.config_name is None


def test_errors_are_raised_through_hydra_main(tmp_path, monkeypatch):
    """Hydra calls ``utils.run_and_report`` by that name for everything that may fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flowtrain"])
    monkeypatch.setattr(utils, "run_and_report", None)

    def fail(cfg):
        raise ZeroDivisionError(cfg.seed)

    with pytest.raises(ZeroDivisionError, match="7"):
        run_hydra("train", ["seed=7", "hydra.run.dir=run"], fail)
    with pytest.raises(HydraException):
        run_hydra("train", ["model=nonsense", "hydra.run.dir=run"], fail)


def test_hydra_takes_a_configuration_that_is_composed_already(tmp_path, monkeypatch):
    """It is the one that Hydra would compose. What the job composes is its own, and afterwards Hydra is as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flowtrain"])
    (tmp_path / "mine/trainer").mkdir(parents=True)
    (tmp_path / "mine/trainer/gentle.yaml").write_text("defaults: [default, _self_]\naccumulate: 2\n")
    words = ["experiment=digits_best", "seed=7", "trainer=gentle", "hydra.run.dir=run"]
    flags = ["--config-dir", "mine"]
    methods = Hydra.get_mode, ConfigLoaderImpl.load_configuration
    received = []

    def task(cfg):
        received.append(OmegaConf.to_container(cfg, resolve=False))
        received.append(OmegaConf.to_container(HydraConfig.get(), resolve=False))
        assert (Hydra.get_mode, ConfigLoaderImpl.load_configuration) == methods
        for seed in (3, 4):
            assert train_config(f"seed={seed}", "model=nice").seed == seed

    def fail(cfg):
        raise ZeroDivisionError

    config = Composition(Loader("mine"), "train", words).whole()
    run_hydra("train", [*flags, *words], task, config)
    run_hydra("train", [*flags, *words], task)
    taken, hydras_of_taken, ours, hydras = received
    assert taken == ours and ours["seed"] == 7 and ours["trainer"]["accumulate"] == 2
    assert hydras["overrides"]["hydra"].pop() == "hydra.mode=RUN"  # Hydra says so itself, where no one has
    assert hydras_of_taken == hydras
    for words in (["seed=8", "hydra.run.dir=other"], ["seed=8", "nonsense=1"]):
        config = Composition(Loader(), "train", ["seed=8"]).whole()
        with pytest.raises(ZeroDivisionError):
            run_hydra("train", words, fail, config)
        assert (Hydra.get_mode, ConfigLoaderImpl.load_configuration) == methods


def test_a_configuration_that_is_composed_already_is_not_composed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flowtrain"])
    config, composed = Composition(Loader(), "train", ["hydra.run.dir=run"]).whole(), []
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", lambda *args, **keys: composed.append(1))
    run_hydra("train", ["hydra.run.dir=run"], lambda cfg: None, config)
    assert not composed


def test_a_file_that_options_share_is_no_option():
    """Every part of Hydra asks ``ConfigRepository.get_group_options`` for the options of a group."""
    options = Loader().options("dataset")
    assert "moons" in options and not [name for name in options if name.startswith("_")]


def test_a_sweep_is_split_as_the_basic_sweeper_runs_it():
    assert split_sweep(parse(["a=1,2", "b=x", "c=range(2)"])) == [
        ["a=1", "b=x", "c=0"],
        ["a=1", "b=x", "c=1"],
        ["a=2", "b=x", "c=0"],
        ["a=2", "b=x", "c=1"],
    ]
    with pytest.raises(HydraException):
        split_sweep(parse(["a=interval(0,1)"]))


@pytest.fixture
def loader(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nseed: 3\nnonsense: ${seed}\n")
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/mine.yaml").write_text("defaults: [default, _self_]\nclip: 2.0\n")
    return Loader(str(tmp_path))


def test_groups_and_their_options(loader):
    assert {"model", "dataset", "trainer"} <= {*loader.groups()}
    assert loader.group_exists("model") and not loader.group_exists("modle")
    assert loader.options("trainer") == ["default", "mine"]  # those of the user's folder too


def test_a_composition_is_taken_apart(loader):
    whole = Composition(loader, "train", ["experiment=mine", "trainer=mine", "model.steps=2"])
    assert [item.input_line for item in whole.values] == ["model.steps=2"]
    (experiment,) = [file for file in whole.overlays() if file.config_path == "experiment/mine"]
    assert whole.content(experiment) == {"seed": 3, "nonsense": "${seed}"}
    assert whole.tree().seed == 3 and whole.tree(without=[experiment]).seed == 1
    assert OmegaConf.select(whole.tree(), "model.steps") == 6  # before the overrides of values


def test_the_whole_is_what_a_job_receives(loader):
    cfg = Composition(loader, "train", ["trainer=mine", "model.steps=2"]).whole()
    assert cfg.model.steps == 2 and cfg.trainer.clip == 2.0 and cfg.hydra.job.config_name == "train"
    with pytest.raises(ConfigCompositionException):
        Composition(loader, "train", ["modle=glow", "seed=1"]).whole()


def test_what_is_missing_is_named(loader):
    with pytest.raises(MissingConfigException) as caught:
        Composition(loader, "train", ["model=glwo"])
    assert caught.value.missing_cfg_file == "model/glwo" and "glow" in caught.value.options


def test_a_sweep_begins_and_launches_where_it_says(tmp_path, monkeypatch):
    calls = []

    class Wrapped(Launcher):
        def __init__(self, launcher, hydra_context, config):
            self.launcher = launcher
            calls.append((hydra_internals.is_sequential(launcher), hydra_internals.is_search(config.hydra.sweeper)))

        def setup(self, **_):
            pass

        def launch(self, job_overrides, initial_job_idx):
            calls.append([word for job in job_overrides for word in job if word.startswith("seed")])
            return []

    monkeypatch.setattr(Plugins, "instantiate_sweeper", None)  # which the next line sets, and monkeypatch undoes
    monkeypatch.setattr(Plugins, "instantiate_launcher", None)
    hydra_internals.before_sweeps(lambda config: calls.append(list(config.hydra.overrides.task)), Wrapped)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["flowtrain"])
    run_hydra("train", ["--multirun", "seed=1,2", "hydra.sweep.dir=sweep"], task=lambda cfg: None)
    assert calls == [["seed=1,2"], (True, False), ["seed=1", "seed=2"]]
