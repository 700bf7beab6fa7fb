"""Tab completion of the command and of paths; Hydra completes the rest.

``eval "$(flowtrain -sc install=bash)"`` (in zsh after ``autoload -U bashcompinit; bashcompinit``), or in fish
``flowtrain -sc install=fish | source``, makes the shell ask ``flowtrain -sc query=…`` about COMP_LINE.
"""

from __future__ import annotations

import os
import re
import shlex
from glob import glob

from flowtrain.commands import CHECKPOINT_KEYS, COMMANDS

PATHS = (*(f"{key}=" for key in CHECKPOINT_KEYS), "init=", "input=", "output=", "dataset.path=")
PATHS += ("dataset.columns=@", "dataset.context=@", "dataset.types=@", "dataset.read=@")
FLAGS = ("--help", "--multirun", "--cfg", "--config-dir")


def prepare(argv: list[str]) -> str | None:
    """Answer the shell and return None; or leave in COMP_LINE what Hydra can answer, and return its root."""
    query = next((word.partition("=")[2] for word in argv if word.startswith("query=")), None)
    if query is None:  # install, uninstall
        return "train"
    line = os.environ.get("COMP_LINE", "")
    words = _words(line) + [""] * line.endswith(" ")
    if len(words) < 3 or words[1] not in COMMANDS:
        return _answer(query, words[1:], [*COMMANDS, "--help", "--version"] if len(words) < 3 else [])
    command, words = COMMANDS[words[1]], words[2:]
    if words[-1].startswith("-"):
        return _answer(query, words, FLAGS)
    key = next((key for key in PATHS if words[-1].startswith(key)), None)
    if key:
        found = glob(words[-1][len(key) :] + "*")
        return _answer(query, words, [key + path + "/" * os.path.isdir(path) for path in sorted(found)])
    if command.words and (found := glob(words[-1] + "*")) and "=" not in words[-1] and words[-1]:
        return _answer(query, words, [path + "/" * os.path.isdir(path) for path in sorted(found)])
    if several := re.fullmatch(r"(\w+=\[(?:[\w-]+,)*)[\w-]*", words[-1]):  # logger=[csv,wa
        from flowtrain.config.compose import conf_dir

        group = conf_dir() / several[1].partition("=")[0]
        return _answer(query, words, [several[1] + file.stem for file in sorted(group.glob("[!_]*.yaml"))])
    from flowtrain.cli.checkpoints import open_checkpoints
    from flowtrain.cli.names import name_paths
    from flowtrain.cli.names import prepare as prepare_names

    before = prepare_names(name_paths(command, words[:-1]))
    root, before = open_checkpoints(command, before, placeholder=True)
    plain = [word for word in before if not re.search(r"[\s'\"]", word)]  # Hydra separates words at blanks
    os.environ["COMP_LINE"] = " ".join(["flowtrain", *plain, words[-1]])
    return root


def _words(line: str) -> list[str]:
    """The words of a line as the shell reads them; the last one may lack the end of its quotes."""
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _answer(shell: str, words: list[str], candidates) -> None:
    matching = [text for text in candidates if text.startswith(words[-1] if words else "")]
    print(("\n" if shell == "fish" else " ").join(matching))
