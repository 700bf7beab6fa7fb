"""CONTRIBUTING.md's recipes, followed word for word in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", TEXT, re.S | re.M))

STEP = re.compile(
    r"^(?:(?P<where>New file|In) `(?P<file>[^`]+)`(?P<how>[^\n]*):\n\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S | re.M
)


@pytest.fixture
def repository(tmp_path):
    """A copy that can be changed and run."""
    for folder in ("conf", "flowtrain", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def insert(file: Path, anchor: str, lines: str) -> None:
    """Put ``lines`` after the line ``anchor``."""
    text, found = re.subn(rf"^{re.escape(anchor)}\n", lambda line: line[0] + lines, file.read_text(), flags=re.M)
    assert found == 1, f"{file} has {found} lines {anchor}"
    file.write_text(text)


def export(file: Path, line: str) -> None:
    """Add the import ``line`` and its name in ``__all__``."""
    name = line.split()[-1]
    text, found = re.subn(r"^__all__ = \[", f'{line}\n__all__ = ["{name}", ', file.read_text(), flags=re.M)
    assert found == 1, f"{file} has no __all__"
    file.write_text(text)


def run(commands: str, repository: Path) -> None:
    """Run the commands as someone who has activated the environment in ``repository``; the first error ends them."""
    commands = 'flowtrain() { python -m flowtrain "$@"; }\n' + commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    bash = ["bash", "-euxo", "pipefail", "-c", commands]
    done = subprocess.run(bash, cwd=repository, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


def follow(recipe: str, repository: Path) -> None:
    """Write the files of a recipe and run its commands, in the order of the text."""
    files = set()
    for step in STEP.finditer(recipe):
        if step["kind"] == "bash":
            python = " ".join(str(file) for file in files if file.suffix == ".py")
            run(f"ruff check --fix {python}\nruff format {python}\n" + step["text"], repository)
            continue
        file = repository / step["file"]
        files.add(file)
        if step["where"] == "New file":
            assert not file.exists()
            file.write_text(step["text"])
        elif step["how"] == ", export it":
            export(file, step["text"])
        else:
            insert(file, re.fullmatch(", after the line `(.*)`", step["how"])[1], step["text"])
    assert 1 <= len(files) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_recipe(title, repository):
    follow(RECIPES[title], repository)


def test_every_recipe_has_commands():
    assert len(RECIPES) == 6
    assert all("```bash" in recipe for recipe in RECIPES.values())
