"""Every command in README.md and docs/ is executed as written, page by page, in an empty folder for each.

Of a fence ```bash each command runs, with the words after "tested with" in its comment appended, such as smoke=true.
A fence ```python runs in one namespace for each page. A fence after "New file `NAME`:" is written first. Other fences
(text, yaml, json) are not executed. A page that runs something of the repository gets a copy of it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import inprocess
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HELPERS = [*(ROOT / "docs").glob("*.py")]
NOTHING_TO_RUN = {"reliability.md", "results.md"}  # text about figures
KINDS = {"bash", "python", "yaml", "text", "json", "csv"}
FENCE = re.compile(
    r"^(?:New file `(?P<file>[^`\n]+)`:\n\n)?(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.S | re.M,
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PROGRAMS = {  # what a machine of its own would have
    "flowtrain": f'exec "{sys.executable}" -m flowtrain "$@"',
    "python": f'exec "{sys.executable}" "$@"',
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    "sbatch": 'SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=1 exec bash "$@"',
    "srun": 'exec "$@"',
}


class Command(NamedTuple):
    """``more``: the words that its comment appends."""

    text: str
    more: str

    @property
    def line(self) -> str:
        return f"{self.text} {self.more}".strip()

    @property
    def is_plain(self) -> bool:
        """Whether a shell adds nothing to it: no pipes, variables or patterns."""
        return not re.search(r"[|<>&;$`*?~]", re.sub(r"'[^']*'", "", self.line))


def fences(page: Path) -> list[re.Match]:
    return [*FENCE.finditer(page.read_text())]


def commands(text: str) -> list[Command]:
    """The commands of a fence, without their comments; a line that ends with a backslash goes on in the next."""
    found = []
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        quoted = r"""'[^']*'|"[^"]*"|[^\s'"#]|(?<=\S)#|[ \t]"""
        before = re.match(f"(?:{quoted})*", line)[0].strip()
        comment = line[len(before) :].strip()
        more = re.search(r"tested with (.*)", comment)
        if before:
            found.append(Command(before, more[1].strip() if more else ""))
    return found


def executed(page: Path) -> list[re.Match]:
    return [fence for fence in fences(page) if fence["kind"] in ("bash", "python")]


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but the scripts of docs/, beside the programs that a page may call."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    place = tmp_path / "page"
    (place / "docs").mkdir(parents=True)
    for file in HELPERS:
        shutil.copy(file, place / "docs")
    return place


def check_out(place: Path) -> None:
    """Copy the repository, with an environment that scripts/environment takes for finished."""
    skipped = shutil.ignore_patterns("__pycache__")
    for name in ("conf", "docs", "flowtrain", "results", "scripts"):
        shutil.copytree(ROOT / name, place / name, ignore=skipped, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "Dockerfile"):
        shutil.copy(ROOT / name, place)
    (place / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(place.parent / "bin" / "python", place / ".venv" / "bin")
    (place / ".venv" / "bin" / "activate").touch()
    project = (ROOT / "pyproject.toml").read_text().rstrip("\n")
    for extras in ("", *EXTRAS):
        (place / ".venv" / f"flowtrain-{extras}.stamp").write_text(f"{project} [{extras}] {place}")


def shell(text: str, place: Path) -> None:
    """Run a text in bash; the first error ends it."""
    path = os.pathsep.join([str(place.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", text], cwd=place, env=env, capture_output=True, text=True, timeout=600
    )
    assert not done.returncode, f"{text}\n{done.stdout}{done.stderr}"


def run_commands(text: str, place: Path) -> None:
    """Run the commands of a fence: flowtrain's in this process, which is faster, the rest in bash."""
    every = commands(text)
    if re.search(r"^(source|cd|export|for|while|if)\b|<<|^\w+=", text, re.M):  # lines that need each other
        return shell("\n".join(command.line for command in every), place)
    for command in every:
        program = command.line.split()[0]
        if program == "flowtrain" and command.is_plain:
            assert not inprocess.flowtrain(place, *shlex.split(command.line)[1:]), command.line
        elif program == "pip":
            check_install(shlex.split(command.line))
        elif program == "docker":
            check_container(shlex.split(command.line), place)
        else:
            shell(command.line, place)


def check_install(words: list[str]) -> None:
    """pip installs this package, with extras that it has."""
    assert words[:2] == ["pip", "install"]
    for word in [word for word in words[2:] if not word.startswith("-")]:
        name, extras = re.fullmatch(r"(\.|flowtrain)(?:\[([\w,]+)\])?", word).groups()
        assert name and set((extras or "tables").split(",")) <= EXTRAS.keys()


def check_container(words: list[str], place: Path) -> None:
    """docker builds the Dockerfile with arguments that it declares; what it would run in the container runs here."""
    options = [word for word in words[2:] if word.startswith("-")]
    if words[1] == "build":
        declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.M))
        given = {words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--build-arg"}
        assert given <= declared and words[-1] == "." and options
    else:
        assert words[1] == "run"
        start = next(i for i, word in enumerate(words) if re.match(r"flowtrain(:\w+)?$", word))
        assert not inprocess.flowtrain(place, *words[start + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in NOTHING_TO_RUN], ids=lambda page: page.name
)
def test_the_page_runs(page, folder, monkeypatch):
    found = executed(page)
    assert found
    if any(re.search(r"^(scripts/|sbatch |source \.venv)", fence["text"], re.M) for fence in found):
        check_out(folder)
    monkeypatch.chdir(folder)
    namespace = {"__name__": page.stem}
    for fence in fences(page):
        if fence["file"]:
            (folder / fence["file"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / fence["file"]).write_text(fence["text"])
        elif fence["kind"] == "bash":
            run_commands(fence["text"], folder)
        elif fence["kind"] == "python":
            exec(compile(fence["text"], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_fence_says_what_it_is(page):
    assert {fence["kind"] for fence in fences(page)} <= KINDS
    assert page.read_text().count("```") == 2 * len(fences(page))
    assert (page.name in NOTHING_TO_RUN) != bool(executed(page))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_extras_that_a_page_names_exist(page):
    named = re.findall(r"(?:flowtrain|\.)\[([\w,]+)\]", page.read_text())
    assert {extra for names in named for extra in names.split(",")} <= EXTRAS.keys()


def test_commands_and_their_comments_are_told_apart():
    text = "a 'b # c' d#e   # one\nf \\\n  g  # long; tested with smoke=true devices=2\n# none\n"
    assert commands(text) == [Command("a 'b # c' d#e", ""), Command("f g", "smoke=true devices=2")]
