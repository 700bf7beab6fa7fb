"""``flowtrain COMMAND --help``, made from ``conf/``: a file's first comment says what it is, and the comment on a key's
line what that key means. Imports no PyTorch."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

import yaml

from flowtrain.cli.checks import PLACES, READ_BY_ALL
from flowtrain.cli.messages import no_option
from flowtrain.commands import COMMANDS, Command
from flowtrain.config.compose import conf_dir

OUTRO = """--cfg job prints the whole configuration and runs nothing. --multirun runs a job for every combination of the
values in key=a,b. --config-dir DIR adds a folder of your own options. {tip}"""
LINE = re.compile(r"(?P<indent> *)(?:- )?(?P<key>[A-Za-z]\w*):(?: +(?P<value>[^#]*?))?(?: *# (?P<comment>.*))?")


class Key(NamedTuple):
    name: str
    value: str
    comment: str


def help_text(name: str, words: list[str], config_dir: str | None = None) -> str:
    """The help of a command. ``words`` may choose options, such as ``model=realnvp``, whose keys are then listed."""
    command, folders = COMMANDS[name], [Path(config_dir or conf_dir()), conf_dir()]
    files = ConfigFiles(folders, dict(word.split("=", 1) for word in words if "=" in word))
    own = files.with_includes(conf_dir() / f"{name}.yaml")
    root = files.with_includes(conf_dir() / f"{command.root}.yaml") if command.root else own
    groups = files.groups() if "model" in files.chosen(root) else [*files.chosen(root)]
    width = min(shutil.get_terminal_size((120, 0)).columns, 120)
    text = [description(own[0]), "", f"usage: flowtrain {name} {usage(command)}", "", "Keys:", ""]
    text += _table(files.keys(own[0]), width)
    for group, options in files.chosen(own).items():
        for option in listed(options):
            found = files.keys(files.find(group, option), f"{group}.")
            text += ["", f"Keys of {group}={option}:", "", *_table(found, width)] if found else []
    text += ["", "Groups, and their options (* is the default): group=option chooses another.", ""]
    defaults = files.chosen(root)
    for group in groups:
        text += [f"  {group}:", *_options(files, group, defaults, width)]
    if "model" in files.chosen(own):
        tip = f"flowtrain {name} model=NAME --help lists that model's keys."
    elif command.on_checkpoint:
        shown = {key.name for key in files.keys(own[0])}
        others = ", ".join(key for key in (*READ_BY_ALL, *PLACES) if key not in shown)
        tip = f"Of the run's own keys, {others} can be given."
    else:
        tip = ""
    return "\n".join([*text, "", *textwrap.wrap(OUTRO.format(tip=tip), width)])


def description(file: Path) -> str:
    """The comment that a file begins with."""
    lines = []
    for line in file.read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line[2:])
    return "\n".join(lines)


def summary(file: Path) -> str:
    """The first sentence of :func:`description`."""
    return re.split(r"(?<=[^.])\.(?= [A-Z]|$)", " ".join(description(file).split()))[0]


def listed(options: str) -> list[str]:
    """The options of ``group=option`` or ``group=[option,…]``."""
    return [option.strip() for option in options.strip("[]").split(",") if option.strip()]


def keys(file: Path, prefix: str = "") -> list[Key]:
    """The dotted keys of a file that have a value, and their comments, which may go on in the lines below."""
    found: list[Key] = []
    parents: dict[int, str] = {}  # indentation -> key, of the mappings around a line
    for line in file.read_text().splitlines():
        more = re.fullmatch(r" {12,}# (.*)", line)
        if more and found:
            found[-1] = found[-1]._replace(comment=f"{found[-1].comment} {more[1]}")
            continue
        match = LINE.fullmatch(line)
        if not match:
            continue
        indent, key, value = len(match["indent"]), match["key"], (match["value"] or "").strip()
        parents = {depth: name for depth, name in parents.items() if depth < indent}
        path = [*parents.values(), key]
        skipped = path[0] in ("hydra", "defaults")
        if not value:
            parents[indent] = key
        if skipped and value != "???" or not value or value.startswith("{") or parents and "${" in value:
            continue
        value = "computed" if "${" in value else value
        name, comment = key if skipped else ".".join(path), match["comment"] or ""
        found.append(Key(prefix + name, "" if value == "???" else value, comment))
    return found


class ConfigFiles:
    """The YAML files of ``folders``, the first that has one; and the options that are chosen of their groups."""

    def __init__(self, folders: list[Path], choices: dict[str, str]):
        self.folders, self.choices = folders, choices

    def find(self, group: str, option: str) -> Path:
        """The file of an option. Raises UsageError where there is none."""
        for folder in self.folders:
            if (file := folder / group / f"{option}.yaml").is_file():
                return file
        raise no_option(group, option, self.options(group))

    def options(self, group: str) -> list[str]:
        """The options of a group; a name with an underscore is a file that options share."""
        return sorted({file.stem for folder in self.folders for file in (folder / group).glob("[!_]*.yaml")})

    def groups(self) -> list[str]:
        found = {path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()}
        return sorted(found - {"hydra"})

    def with_includes(self, file: Path) -> list[Path]:
        """A file, and those of its group that its defaults list includes by name."""
        names = [entry for entry in _defaults(file) if isinstance(entry, str) and entry != "_self_"]
        group = "" if file.parent in self.folders else file.parent.name
        return [file, *(inner for name in names for inner in self.with_includes(self.find(group, name)))]

    def keys(self, file: Path, prefix: str = "") -> list[Key]:
        """The keys of a file and of those that it includes, whose values it may replace."""
        found: dict[str, Key] = {}
        for one in self.with_includes(file):
            for key in keys(one, prefix):
                first = found.setdefault(key.name, key)
                found[key.name] = first._replace(comment=first.comment or key.comment)
        return [*found.values()]

    def chosen(self, roots: list[Path]) -> dict[str, str]:
        """Group -> the option of the words, else of a defaults list; then the groups that the options choose for."""
        found: dict[str, str] = {}
        todo = [*roots]
        for file in todo:  # which grows
            for entry in _defaults(file):
                for name, option in entry.items() if isinstance(entry, dict) else ():
                    group = name.split("@")[0].strip("/")
                    option = self.choices.get(group, option)
                    if not name.startswith("override ") and option not in (None, "???") and group not in found:
                        found[group] = option
                        for one in listed(option):
                            todo += self.with_includes(self.find(group, one))
        return found


def _defaults(file: Path) -> list:
    return yaml.safe_load(file.read_text()).get("defaults", [])


def usage(command: Command) -> str:
    paths = [f"[{key}=PATH]" for key in command.on_checkpoint if key != "resume"]
    paths += ["PATH PATH …"] if command.words and command.words not in command.on_checkpoint else []
    return " ".join([*paths, "[group=option]", "[key=value]", "[--multirun]", "[--cfg job]"])


def _table(found: list[Key], width: int) -> list[str]:
    """Columns: name, value, comment."""
    lines = []
    left = 2 + max((len(key.name) for key in found), default=0) + 2
    middle = min(max((len(key.value) for key in found), default=0), 12) + 2
    for name, value, comment in found:
        start = f"  {name}".ljust(left) + value
        start = start.ljust(left + middle) + ("  " if len(value) > middle - 2 else "")
        wrapped = textwrap.wrap(comment, width - left - middle) or [""]
        if len(start) > left + middle:
            lines += [start.rstrip(), *(" " * (left + middle) + line for line in wrapped if line)]
        else:
            lines += [(start + wrapped[0]).rstrip(), *(" " * (left + middle) + line for line in wrapped[1:])]
    return lines


def _options(files: ConfigFiles, group: str, defaults: dict[str, str], width: int) -> list[str]:
    names = files.options(group)
    left = max(map(len, names), default=0) + 2
    return [
        f"  {'*' if name in listed(defaults.get(group, '')) else ' '} {name:{left}}"
        + textwrap.shorten(summary(files.find(group, name)), width - left - 4, placeholder=" …")
        for name in names
    ]
