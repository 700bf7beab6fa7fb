"""Promise 9: a mistake in any key or value is refused before data are opened, in one line that names the right key.

The mistakes are generated from the configurations that the commands compose.
"""

import contextlib
import difflib
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from composed import VECTORS, compose_tree, options
from inprocess import flowtrain
from omegaconf import OmegaConf

from flowtrain.cli import exit_codes
from flowtrain.commands import COMMANDS
from flowtrain.config.schema import TrainConfig, TrainerConfig
from flowtrain.data.dataset import Dataset

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE.parent)))}
CHECKPOINT_COMMANDS = [name for name, command in COMMANDS.items() if "ckpt" in command.on_checkpoint]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run."""
    cwd = tmp_path_factory.mktemp("trained")
    assert flowtrain(cwd, "train", "smoke=true", "max_steps=1", "logger=none") == 0
    (found,) = cwd.glob("outputs/*/*")
    return found


@pytest.fixture(scope="module")
def lines(run):
    """Command -> its first words, and the configuration that it composes."""
    words = {command: [command, f"ckpt={run}"] for command in CHECKPOINT_COMMANDS}
    words |= {command: [command] for command in COMMANDS if command not in words}
    words["rerun"] = ["rerun", str(run)]
    words["train resume"] = ["train", f"resume={run}"]
    words["check model"] = ["check", "model=nice"]
    found = {}
    for name, line in words.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert flowtrain(run.parent, *line, "--cfg", "job") == 0
        found[name] = line, yaml.safe_load(out.getvalue())
    return found


def leaves(node: dict, prefix: str = ""):
    """Yield the dotted keys and values of a configuration."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def names(node: dict, prefix: str = "") -> set[str]:
    """Every dotted key of a configuration, with those of its mappings."""
    inner = (names(value, f"{prefix}{key}.") for key, value in node.items() if isinstance(value, dict))
    return {f"{prefix}{key}" for key in node}.union(*inner)


def mistype(key: str, valid, draw: random.Random) -> str:
    """Make one typing error in the last name of a key."""
    head, dot, name = key.rpartition(".")
    slips = [name[: i + 1] + name[i:] for i in range(len(name))]  # a letter twice
    if len(name) > 3:
        slips += [name[:i] + name[i + 1 :] for i in range(1, len(name))]  # left out
        slips += [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)]  # two swapped
        slips += [name[:i] + "x" + name[i + 1 :] for i in range(1, len(name))]  # another
    slips = [head + dot + slip for slip in slips if head + dot + slip not in valid and slip.isidentifier()]
    return draw.choice(slips)


def names_the_nearest(text: str, wrong: str, meant: str, valid) -> bool:
    """Whether a message suggests the intended key, or a valid key that is as similar to the wrong one."""
    if "is fixed by the checkpoint" in text:
        return True
    if "did you mean '" not in text:
        return False
    suggestion = text.partition("did you mean '")[2].partition("'")[0]
    near = [difflib.SequenceMatcher(a=wrong, b=name).ratio() for name in (suggestion, meant)]
    return suggestion == meant or suggestion in valid and near[0] >= near[1] - 1e-9


def run_without_torch(cwd, cases: list[list[str]]) -> list[list]:
    """Run command lines in a process that cannot import torch: their exit codes and messages."""
    result = subprocess.run(
        [sys.executable, str(HERE / "without_torch.py")],
        input=json.dumps(cases),
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def sample_cases(cases: list, count, draw: random.Random) -> list:
    return draw.sample(cases, count(len(cases)))


def find_failures(cwd, cases: list[tuple], valid: set) -> dict:
    """The messages of (words, wrong key, intended key) that are not as they should be."""
    found = run_without_torch(cwd, [words for words, _, _ in cases])
    wrong = {}
    for (words, typed, meant), (code, text) in zip(cases, found, strict=True):
        if code != 2 or "\n" in text or not names_the_nearest(text, typed, meant, valid) or "torch" in text:
            wrong[" ".join(words)] = code, text
    return wrong


def test_a_typo_in_any_key_of_any_command_is_refused(lines, tmp_path, count, promise):
    draw, cases, valid = random.Random(1), [], set()
    for name, (words, config) in lines.items():
        here = {key for key, _ in leaves(config)}
        valid |= names(config)
        if name == "train resume":  # the keys of these groups depend on the checkpoint
            here = {key for key in here if not key.startswith(("optimizer.", "scheduler.", "logger."))}
        if name == "rerun":  # and those of the model and its parts, which may change
            here = {key for key in here if "." not in key or key.startswith(("dataset.", "dist.", "trainer."))}
        for key in sorted(here):
            wrong = mistype(key, names(config), draw)
            cases.append(([*words, f"{wrong}=1"], wrong, key))
    chosen = sample_cases(cases, count, draw)
    wrong = find_failures(tmp_path, chosen, valid | {"dataset.root", "dataset.path", "dataset.download"})
    promise(
        9,
        "one typo in every key of every command, refused before torch is imported, the nearest name given",
        f"{len(chosen) - len(wrong)} of {len(chosen)}",
    )
    assert not wrong, "\n".join(f"{words}: {what}" for words, what in wrong.items())
    assert not any(tmp_path.iterdir()) and len(cases) > 500


def nest(key: str, value) -> dict:
    """A configuration with one value at a dotted key."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def test_a_typo_in_a_users_experiment_or_trainer_is_refused(lines, tmp_path, count, promise):
    draw, cases = random.Random(2), []
    config = lines["train"][1]
    valid, keys = names(config), sorted(key for key, _ in leaves(config))
    keys = [(key, "experiment") for key in keys if key != "allow"] + [
        (key, "trainer") for key in keys if key.startswith("trainer.")
    ]
    for number, (key, group) in enumerate(sample_cases(keys, count, draw)):
        wrong = mistype(key, valid, draw)
        folder = tmp_path / f"mine{number}" / group
        folder.mkdir(parents=True)
        content = nest(wrong, 1) if group == "experiment" else {"defaults": ["default", "_self_"], wrong[8:]: 1}
        first = "# @package _global_\n" if group == "experiment" else ""
        (folder / "own.yaml").write_text(first + yaml.safe_dump(content))
        cases.append((["train", "--config-dir", str(folder.parent), f"{group}=own"], wrong, key))
    wrong = find_failures(tmp_path, cases, valid)
    promise(9, "the same in experiments and trainers of one's own", f"{len(cases) - len(wrong)} of {len(cases)}")
    assert not wrong, "\n".join(f"{words}: {what}" for words, what in wrong.items())
    assert not any(path.name == "outputs" for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "group, parent, key, meant",
    [
        ("optimizer", "adam", "lrr", "lr"),
        ("optimizer", "sgd", "momentun", "momentum"),
        ("scheduler", "steps", "facttor", "factor"),
        ("dataset", "digits", "val_sizee", "val_size"),
        ("model", "glow", "stepps", "steps"),
    ],
)
def test_a_typo_in_a_file_that_extends_another_is_refused(tmp_path, run_without_data, group, parent, key, meant):
    """The constructor's signature gives the valid keys, before data are opened."""
    (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / group / "own.yaml").write_text(f"defaults: [{parent}, _self_]\n{key}: 1\n")
    code, text = run_without_data("train", "--config-dir", "mine", f"{group}=own")
    assert code == 2 and f"did you mean '{group}.{meant}'?" in text


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_without_data(tmp_path, monkeypatch):
    """``run_without_data(*words)``: run a command that must not open data, and return its exit code and message."""

    def split(self, name):
        raise AssertionError("data are opened")

    monkeypatch.setattr(Dataset, "split", split)

    def run(*words):
        try:
            return flowtrain(tmp_path, *words), ""
        except Exception as error:
            text, code = exit_codes.describe_error(error)
            return code, text

    return run


def train_lines() -> list[list[str]]:
    """Command lines that together have every key."""
    lines = [
        [f"{group}={name}"] for group in ("model", "optimizer", "scheduler", "univariate") for name in options(group)
    ]
    lines += [["model=realnvp", f"norm={name}"] for name in options("norm")]
    lines += [[f"base={name}", "dataset.context=label"] for name in options("base")]
    lines += [[f"objective={name}", "target=funnel"] for name in ("reverse_kl", "alpha2")]
    for name in options("dataset"):
        if name not in ("table", "target"):
            lines.append([f"dataset={name}", *(["model=maf"] if name in VECTORS else [])])
    return lines


def violations(lines: list[list[str]]) -> list[list[str]]:
    """``lines`` with −1 for one number, for every number of their configurations."""
    found = {}
    for line in lines:
        tree = OmegaConf.to_container(compose_tree(*line), resolve=False)
        for key, value in leaves(tree):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            root = key.split(".")[0]
            if root == "preprocess" and tree["model"]["_target_"] == "flowtrain.flows.autoregressive":
                continue  # it has its own preprocessing
            part = tree[root].get("_target_") if isinstance(tree[root], dict) else None
            found.setdefault((key, str(part)), [*line, f"{key}=-1"])
    return list(found.values())


def out_of_range(schema, prefix: str = "") -> list[str]:
    """Overrides just outside each bound of a schema, and others of a wrong type."""
    words = []
    for item in fields(schema):
        bounds = item.metadata
        if bounds.get("least") is not None:
            words.append(f"{prefix}{item.name}={bounds['least'] - 1}")
        for bound in ("above", "below"):
            if bounds.get(bound) is not None:
                words.append(f"{prefix}{item.name}={bounds[bound]}")
        if "Literal" in str(item.type):
            words.append(f"{prefix}{item.name}=nonsense")
        if item.type is bool:
            words.append(f"{prefix}{item.name}=3")
    return words


def test_values_out_of_range_are_refused(run, run_without_data, tmp_path, count, promise):
    draw = random.Random(3)
    cases = [["train", *line] for line in violations(sample_cases(train_lines(), count, draw))]
    cases += [["train", word] for word in out_of_range(TrainConfig) + out_of_range(TrainerConfig, "trainer.")]
    for command in COMMANDS:
        line = [command, f"ckpt={run}"] if command in CHECKPOINT_COMMANDS else [command]
        cases += [
            [*line, word] for word in out_of_range(COMMANDS[command].config) if word not in out_of_range(TrainConfig)
        ]
    assert len(cases) >= 100
    chosen = draw.sample(cases, count(100))
    wrong = {}
    for words in chosen:
        code, text = run_without_data(*words)
        value = words[-1].split("=")[1]
        if code != 2 or "\n" in text or "are opened" in text or value.lstrip("-") not in text:
            wrong[" ".join(words)] = code, text
    promise(
        9, "100 values out of range, refused before data are touched", f"{len(chosen) - len(wrong)} of {len(chosen)}"
    )
    assert not wrong, "\n".join(f"{words}: {what}" for words, what in wrong.items())
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left


def test_mistakes_are_refused_in_new_processes(lines, tmp_path, count, promise):
    draw = random.Random(4)
    config = lines["train"][1]
    keys = draw.sample(sorted(key for key, _ in leaves(config)), count(20))
    typos = [(["train", f"{mistype(key, names(config), draw)}=1"], "did you mean") for key in keys]
    ranges = [["train", word] for word in out_of_range(TrainConfig) + out_of_range(TrainerConfig, "trainer.")]
    ranges += [["train", *line] for line in violations([["model=nsf_coupling"], ["model=realnvp", "norm=batchnorm"]])]
    ranges = [(words, "") for words in draw.sample(ranges, count(20))]
    wrong = {}
    for words, message in typos + ranges:
        result = subprocess.run(
            [sys.executable, "-m", "flowtrain", *words],
            cwd=tmp_path,
            env=ENV,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if result.returncode != 2 or result.stdout or result.stderr.count("\n") != 1 or message not in result.stderr:
            wrong[" ".join(words)] = result.returncode, result.stdout, result.stderr
        if any(path.is_file() for path in tmp_path.rglob("*")):
            wrong[" ".join(words)] = "files"
    total = len(typos) + len(ranges)
    promise(9, "20 of each in processes of their own", f"{total - len(wrong)} of {total}")
    assert not wrong, "\n".join(f"{words}: {what}" for words, what in wrong.items())
