"""Tab completion of the command and of paths; Hydra completes the rest.

``flowtrain completion bash`` prints what makes bash ask ``flowtrain -sc query=bash`` about COMP_LINE, the line up to
the cursor. Imports no PyTorch.
"""

from __future__ import annotations

import os
import re
import shlex
from glob import glob

from flowtrain.commands import CHECKPOINT_KEYS, COMMANDS
from flowtrain.errors import UsageError

# What a candidate ends with decides whether a blank follows it: none after a key, a part of a key, or a folder. bash
# splits words at = and : and then wants only the last part of a candidate.
BASH = r"""_flowtrain() {
    local line=${COMP_LINE:0:COMP_POINT} breaks= mark candidate
    local word=${line##*[[:blank:]]}
    for mark in = : @; do [[ $COMP_WORDBREAKS == *$mark* ]] && breaks+=$mark; done
    local before=
    [[ $breaks && $word == *[$breaks]* ]] && before=${word%"${word##*[$breaks]}"}
    COMPREPLY=()
    for candidate in $(COMP_LINE=$line "$1" -sc query=bash 2> /dev/null); do
        case $candidate in
            *[=./]) COMPREPLY+=("${candidate#"$before"}") ;;
            *) COMPREPLY+=("${candidate#"$before"} ") ;;
        esac
    done
}
complete -o nospace -o default -F _flowtrain flowtrain"""
ZSH = r"""_flowtrain() {
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a found
    found=(${(f)"$(COMP_LINE=$line ${(Q)words[1]} -sc query=fish 2> /dev/null)"})
    compadd -Q -S '' -- ${(M)found:#*[=./]}
    compadd -Q -- ${found:#*[=./]}
}
whence compdef > /dev/null || { autoload -Uz compinit && compinit }
compdef _flowtrain flowtrain"""
FISH = r"""function __flowtrain_complete
    set -lx COMP_LINE (commandline -cp)
    set -l words (commandline -opc)
    $words[1] -sc query=fish 2> /dev/null
end
complete -c flowtrain -f -a '(__flowtrain_complete)'"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
USAGE = """usage: flowtrain completion bash|zsh|fish

Prints what makes a shell complete commands, groups, options, keys and run directories. Put one line where the shell
reads it when it starts:

  ~/.bashrc                   eval "$(flowtrain completion bash)"
  ~/.zshrc                    eval "$(flowtrain completion zsh)"
  ~/.config/fish/config.fish  flowtrain completion fish | source
"""
PATHS = (*(f"{key}=" for key in CHECKPOINT_KEYS), "init=", "input=", "output=", "dataset.path=")
PATHS += ("dataset.columns=@", "dataset.context=@", "dataset.types=@", "dataset.read=@")
FLAGS = ("--help", "--multirun", "--cfg", "--config-dir")


def script(words: list[str]) -> str:
    """What ``flowtrain completion SHELL`` prints."""
    if words in ([], ["-h"], ["--help"]):
        return USAGE
    if len(words) > 1 or words[0] not in SCRIPTS:
        raise UsageError(f"completion {' '.join(words)}: give one of {', '.join(SCRIPTS)}")
    return SCRIPTS[words[0]] + "\n"


def prepare(argv: list[str]) -> str | None:
    """Answer the shell and return None; or leave in COMP_LINE what Hydra can answer, and return its root."""
    query = next((word.partition("=")[2] for word in argv if word.startswith("query=")), None)
    if query is None:  # install, uninstall
        return "train"
    line = os.environ.get("COMP_LINE", "")
    words = _words(line) + [""] * line.endswith(" ")
    if words[1:2] == ["completion"] and len(words) == 3:
        return _answer(query, words, SCRIPTS)
    if len(words) < 3 or words[1] not in COMMANDS:
        return _answer(query, words[1:], [*COMMANDS, "completion", "--help", "--version"] if len(words) < 3 else [])
    command, words = COMMANDS[words[1]], words[2:]
    if words[-1].startswith("-"):
        return _answer(query, words, FLAGS)
    key = next((key for key in PATHS if words[-1].startswith(key)), None)
    if key:
        return _answer(query, words, [key + path for path in _paths(words[-1][len(key) :], key[:-1])])
    if command.words and re.match(r"outputs|[./]", words[-1]):  # runs that are no value of a key
        return _answer(query, words, _paths(words[-1], ""))
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


def _paths(start: str, key: str) -> list[str]:
    """The runs whose paths begin so, the newest first, where the key takes a run; else files and folders."""
    if key in CHECKPOINT_KEYS:
        from flowtrain.config.runs import newest_first

        if found := [str(run) for run in newest_first() if str(run).startswith(start)]:
            return found
    return [path + "/" * os.path.isdir(path) for path in sorted(glob(start + "*"))]


def _words(line: str) -> list[str]:
    """The words of a line as the shell reads them; the last one may lack the end of its quotes."""
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _answer(shell: str, words: list[str], candidates) -> None:
    matching = [text for text in candidates if text.startswith(words[-1] if words else "")]
    print(("\n" if shell == "fish" else " ").join(matching))
