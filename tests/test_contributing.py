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
    r"New file `(?P<new>[^`]+)`:\n\n```\w+\n(?P<text>.*?)```"
    r"|In `(?P<old>[^`]+)`, after the line `(?P<anchor>[^\n]+)`:\n\n```\w+\n(?P<lines>.*?)```"
    r"|```bash\n(?P<commands>.*?)```",
    re.S,
)


@pytest.fixture
def repository(tmp_path):
    """A copy that can be changed and run."""
    for folder in ("conf", "flowtrain", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def insert(file: Path, anchor: str, lines: str) -> None:
    """Put ``lines`` after the one line of ``file`` that says ``anchor``, indented like it."""
    pattern = re.compile(rf"^( *){re.escape(anchor)}\n", re.M)
    text, found = pattern.subn(lambda m: m[0] + re.sub(r"^(?=.)", m[1], lines, flags=re.M), file.read_text())
    assert found == 1, f"{file} has {found} lines {anchor}"
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
        if step["new"]:
            assert not (repository / step["new"]).exists()
            (repository / step["new"]).write_text(step["text"])
        elif step["old"]:
            insert(repository / step["old"], step["anchor"], step["lines"])
        else:
            run("python -m ruff check -q . && python -m ruff format --check -q .", repository)
            run(step["commands"], repository)
        files |= {step["new"] or step["old"]} - {None}
    assert 1 <= len(files) <= 3


@pytest.mark.parametrize("title", RECIPES)
def test_recipe(title, repository):
    follow(RECIPES[title], repository)


def test_every_block_of_a_recipe_is_followed():
    for title, recipe in RECIPES.items():
        assert len(STEP.findall(recipe)) == recipe.count("\n```\n") > 1, title
