"""Configuration as values and as objects: types, ranges, the allow-list, run directories."""

import subprocess
import sys

import pytest
from composed import checkpoint_command_config, configuration, flow_of

import flowtrain
from flowtrain.cli import exit_codes
from flowtrain.config import build, restore, runs
from flowtrain.config.allow import check_targets
from flowtrain.config.conversion import to_dict, validate
from flowtrain.config.schema import DistConfig, TrainConfig, TrainerConfig
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import environment

TRAINER = to_dict(configuration().trainer)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"clip": "abc"}, "clip=abc: must be a number above 0, or null"),
        ({"clip": -1}, "clip=-1: must be a number above 0"),
        ({"ema": 1}, "ema=1: must be a number of at least 0 and below 1"),
        ({"accumulate": 1.5}, "accumulate=1.5: must be a whole number of at least 1"),
        ({"accumulate": True}, "accumulate=true: must be a whole number"),
        ({"profile": 1}, "profile=1: must be true or false"),
    ],
)
def test_settings_name_the_key_and_what_is_right(values, message):
    with pytest.raises(UsageError) as caught:
        validate(TrainerConfig, TRAINER | values)
    assert message in str(caught.value)


def test_values_are_converted_and_none_is_missing():
    clip = validate(TrainerConfig, TRAINER | {"clip": 1}).clip
    assert clip == 1.0 and isinstance(clip, float)
    keys = {"n": 1, "temperature": [1, 0.5], "label": None, "context": None, "output": None, "plot": True}
    keys |= {"weights": "raw", "mcmc": False, "guidance": 0, "decoding": "steps", "denoise": None}
    sample = checkpoint_command_config("sample", configuration(), ckpt="run", **keys)
    assert sample.temperature == [1.0, 0.5] and all(isinstance(value, float) for value in sample.temperature)
    with pytest.raises(UsageError, match="trainer.accumulate: is missing"):
        validate(TrainerConfig, {"clip": 1}, "trainer.")
    with pytest.raises(UsageError, match="no key 'trainer.clipp'; did you mean 'trainer.clip'"):
        validate(TrainerConfig, TRAINER | {"clipp": 1}, "trainer.")


def test_a_configuration_and_its_plain_values_are_equal():
    config = configuration("model=maf", "dataset=moons")
    values = to_dict(config)
    assert values["univariate"] == config.parts["univariate"] and "parts" not in values
    assert values["trainer"]["clip"] == config.trainer.clip == 1.0 and config.dist == DistConfig(timeout_s=1800.0)
    assert validate(TrainConfig, values) == config


def test_the_package_lists_what_it_imports_late():
    code = "import sys, flowtrain; print(*dir(flowtrain)); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"Flow", "bijections", "distributions", "flows", "load", "nets"} <= set(done.stdout.split())
    assert flowtrain.bijections.Chain and flowtrain.Flow and callable(flowtrain.load)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flowtrain.nonsense  # noqa: B018


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._commit() is None
    (tmp_path / "git").touch()  # that cannot be executed
    assert environment._commit() is None


@pytest.mark.parametrize(
    "target",
    ["os.system", "torch.optim.adam.torch.hub.os.mkdir", "torch.optim.Optimizer", "flowtrain.flow.math.exp", ["a"], 3],
)
def test_allow_list_is_exact(target):
    with pytest.raises(UsageError, match="model.part"):
        check_targets({"model": {"part": {"_target_": target}}})


def test_allow_list_knows_public_classes_and_what_a_module_defines(tmp_path, monkeypatch):
    check_targets({"a": [{"_target_": "flowtrain.bijections.Chain"}, {"_target_": "torch.optim.AdamW"}]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownparts.py").write_text("from os import system\nclass Mine: pass\n")
    check_targets({"_target_": "ownparts.Mine"}, allow=["ownparts"])
    with pytest.raises(UsageError):
        check_targets({"_target_": "ownparts.system"}, allow=["ownparts"])
    with pytest.raises(UsageError, match="nowhere_at_all"):
        check_targets({}, allow=["nowhere_at_all"])


def test_an_unforeseen_error_of_a_constructor_is_one_line(tmp_path, monkeypatch):
    """Its chain of causes must have an end: describe_error() follows it."""
    (tmp_path / "odd_module.py").write_text("class Odd:\n    def __init__(self):\n        raise KeyError('odd')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyError) as caught:
        build.build({"_target_": "odd_module.Odd"}, "model", allow=["odd_module"])
    assert exit_codes.describe_error(caught.value) == ("KeyError: 'odd' (HYDRA_FULL_ERROR=1 shows where)", 1)


def test_build_names_the_node_that_is_refused():
    with pytest.raises(UsageError, match="model.part: "):
        build.build({"part": {"_target_": "flowtrain.bijections.Squeeze", "shape": [3]}}, "model")
    with pytest.raises(UsageError, match="no key 'model.nonsense'"):
        build.build({"_target_": "flowtrain.bijections.Squeeze", "nonsense": 1}, "model")


@pytest.mark.parametrize(
    "words, says",
    [
        ("+dataset.fliq=true", "no key 'dataset.fliq'; did you mean 'dataset.flip'?"),
        ("model=made +norm=actnorm", "norm: nothing in this model reads it"),
        ("model=autoregressive +univariate=affine", "univariate: nothing in this model reads it"),
        ("+model.context_shape=[2]", "model.context_shape: the dataset decides this"),
        ("+preprocess.grey_levels=3", "preprocess.grey_levels: the dataset decides this"),
        ("+model.univariate.bins=3", "no key 'model.univariate.bins'; did you mean 'univariate.bins'?"),
        ("model=custom +model.layers.even.net.hidde=3", "did you mean 'model.layers.even.net.hidden'?"),
        ("model=ffjord +model.ode.foo=1", "no key 'model.ode.foo': Continuous takes no such argument"),
        ("dataset=moons smoke=true", "this model takes images"),
    ],
)
def test_a_flow_is_refused(words, says):
    with pytest.raises(UsageError) as caught:
        flow_of(*words.split(), device="meta")
    assert says in str(caught.value)


@pytest.mark.parametrize("model", ["custom dataset=moons", "custom_image", "glow"])
def test_none_leaves_a_part_out(model):
    names = {"mixing", "preprocess"} | ({"norm"} if "image" in model or model == "glow" else set())

    def count_layers(*words: str) -> int:
        flow = flow_of(f"model={model.split()[0]}", *model.split()[1:], *words, device="meta")
        return sum(1 for name, _ in flow.named_modules() if name.rpartition(".")[2] in names)

    left = [count_layers(f"{name}=none") for name in sorted(names)]
    assert count_layers(*(f"{name}=none" for name in names)) == 0 and count_layers() >= max(left)


def test_smoke_leaves_a_models_null_alone():
    assert configuration("smoke=true").model["levels"] is None
    assert configuration("smoke=true", "model.levels=3").model["levels"] == 2
    assert configuration("smoke=true", "max_steps=null").max_steps == 3
    assert flow_of("dataset=synthetic", "dataset.shape=[1,6,6]", "smoke=true", device="meta")


def test_claim_gives_each_run_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "dry_run", False)  # an earlier test's --cfg has set it
    path = str(tmp_path / "outputs" / "2026-01-01_00-00-00")
    assert [runs.claim(path) for _ in range(3)] == [path, path + "_2", path + "_3"]


def test_runs_are_sorted_by_their_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a/2026-01-02_00-00-00", "b/2026-01-01_23-59-59", "a/2026-01-02_00-00-00_2", "a/2026-01-02_00-00-00_10"]
    for name in names:
        (tmp_path / "outputs" / name / "checkpoints").mkdir(parents=True)
    found = [str(run.relative_to("outputs")) for run in runs.newest_first()]
    assert found == [names[3], names[2], names[0], names[1]]


@pytest.mark.parametrize(
    "change",
    [
        {"hydra": {"callbacks": {}}},
        {"unknown": 1},
        {"seed": "${oc.env:HOME}"},
        {"seed": object()},
        {"paper": "x" * 10_000_000},
        {1: 2},
        "nest",
    ],
)
def test_a_checkpoints_configuration_is_only_plain_data(change):
    if change == "nest":
        change = {"paper": {}}
        node = change["paper"]
        for _ in range(100):
            node["a"] = {}
            node = node["a"]
    with pytest.raises(ValueError):
        restore._check_plain({"seed": 1, **change})


def test_checkpoint_of_another_kind(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(FlowtrainError, match="text.pt"):
        restore.checkpoint_config(tmp_path / "text.pt")
