"""Names and other texts on a command line: read from a file, and quoted as Hydra's grammar needs."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from flowtrain.cli.hydra_internals import QUOTED
from flowtrain.cli.keys import OPEN
from flowtrain.commands import Command
from flowtrain.errors import UsageError

LISTS = ("dataset.columns", "dataset.context")  # keys that list names of columns
NAMES = (*LISTS, "dataset.weights")
MAPPINGS = (*OPEN, "context")  # keys whose mappings have names of columns as keys
FROM_FILE = (*LISTS, *OPEN)  # KEY=@FILE


def prepare(words: list[str]) -> list[str]:
    """The words as Hydra takes them: ``KEY=@FILE`` replaced by what the file holds, ``target=MODULE:FUNCTION`` by the
    option that takes a function, and mappings to which any key may be added marked as such. Raises UsageError for a
    file that cannot be read.

    >>> prepare(["target=my.module:log_prob"])
    ['target=function', 'target.function._target_=my.module.log_prob']
    """
    words = [part for word in words for part in _name_function(_read_files(word))]
    return [f"++{word}" if re.match(rf"({'|'.join(map(re.escape, OPEN))})[.=]", word) else word for word in words]


def name_paths(command: Command, words: list[str]) -> list[str]:
    """The words with those that are paths by themselves at the command's key for them, last.

    >>> from flowtrain.commands import COMMANDS
    >>> name_paths(COMMANDS["compare"], ["outputs/a", "split=val", "outputs/b"])
    ['split=val', 'runs=["outputs/a","outputs/b"]']
    """
    key = command.words
    paths = [word for word in words if key and _is_path(word)]
    if not paths:
        return words
    others = [word for word in words if word not in paths]
    if key in command.on_checkpoint:
        return [*others, *(f"{key}={path}" for path in paths)]
    if given := next((word for word in others if word.partition("=")[0] == key), None):
        raise UsageError(f"{given}: name the {key} with {key}= or as words, not both")
    return [*others, f"{key}={_write(paths)}"]


def _is_path(word: str) -> bool:
    return "=" not in word and not re.match(r"[~+](?!/)", word) or os.path.exists(os.path.expanduser(word))


def _name_function(word: str) -> list[str]:
    found = re.fullmatch(r"target=([\w.]+):(\w+)", word)
    return ["target=function", f"target.function._target_={found[1]}.{found[2]}"] if found else [word]


def _read_files(word: str) -> str:
    key, _, value = word.partition("=")
    if key.lstrip("+") not in FROM_FILE or not value.startswith("@"):
        return word
    return f"{key}={','.join(_read(key.lstrip('+'), path[1:]) for path in re.split(',(?=@)', value))}"


def _read(key: str, path: str) -> str:
    """The names in a file, one a line, or for a key that takes a mapping its YAML, as Hydra's grammar writes them."""
    try:
        text = Path(path).expanduser().read_text("utf-8-sig")
        if key in LISTS:
            content = [line.strip() for line in text.split("\n") if line.strip()]
        else:
            content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{key}=@{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{key}=@{path}: is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date
        raise UsageError(f"{key}=@{path}: cannot be read: {' '.join(str(error).split())}") from None
    if key in LISTS and not content:
        raise UsageError(f"{key}=@{path}: holds no names; write one a line")
    if key not in LISTS and not isinstance(content, dict):
        raise UsageError(f"{key}=@{path}: must hold lines of NAME: VALUE")
    return _write(content)


def _write(value) -> str:
    """A value in Hydra's grammar, with every text in quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quote(str(name))}:{_write(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_write, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) if isinstance(value, int | float) else _quote(str(value))


def _quote(text: str) -> str:
    """``text`` in quotes, as itself: OmegaConf would read ``${`` as an interpolation."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text, Quote.double).with_quotes()


# ---- what to type instead


def quoting(word: str, why: str = "hold more than letters and digits") -> UsageError | None:
    """The refusal that says what to type instead of a word that Hydra cannot read, or reads as other names than were
    typed; None where no quotes would help."""
    key, equals, text = word.partition("=")
    bare = key.lstrip("+")
    root = next((root for root in MAPPINGS if bare.startswith(f"{root}.")), None)
    if root:  # a name that no dotted key takes
        bare, text = root, f"{{{bare[len(root) + 1 :]}: {text}}}"
    values = _split(text)
    if not all(value[0] in "[{" for value in values):  # else several are a sweep
        values = [text.strip()]
    repaired = f"{bare}={','.join(_repair(value, bare in NAMES) for value in values)}"
    is_cut = text.strip().startswith(("[", "{")) and repaired.startswith(f'{bare}="')  # a bracket lacks its other half
    if not equals or "\n" in word or repaired == word or is_cut or parse(repaired) is None:
        return None
    what = "names" if bare in (*NAMES, *MAPPINGS) else "texts"
    typed = word.removeprefix("++")  # which prepare adds
    return UsageError(f"{typed}: quote {what} that {why}; type: {shlex.quote(repaired)}")


def misread(item) -> bool:
    """Whether an override has numbers, true, false or null where only names can stand."""
    value = item.value()
    if item.key_or_group in LISTS and isinstance(value, list):
        return any(name is None or isinstance(name, bool | float) for name in value)
    return item.key_or_group in NAMES and isinstance(value, bool | float) or _has_other_keys(value)


def _has_other_keys(value) -> bool:
    """Whether a mapping in ``value`` has a key that is no text."""
    if isinstance(value, dict):
        return any(not isinstance(name, str) or _has_other_keys(item) for name, item in value.items())
    return isinstance(value, list) and any(map(_has_other_keys, value))


def parse(word: str):
    """Hydra's override, or None for a word outside its grammar."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _repair(text: str, is_name: bool) -> str:
    """The value ``text``, with quotes where Hydra needs them; ``is_name``: it is a name or a list of names."""
    if text.startswith("[") and text.endswith("]"):
        return f"[{','.join(_repair(item, is_name) for item in _split(text[1:-1]))}]"
    if text.startswith("{") and text.endswith("}"):
        items = [_split_item(item) for item in _split(text[1:-1])]
        return f"{{{', '.join(f'{_repair_key(name)}: {_repair(value, False)}' for name, value in items)}}}"
    parsed = parse(f"x={text}")
    if is_name:
        value = parsed and parsed.value()
        kept = isinstance(value, str) or type(value) is int and str(value) == text
        return text if kept else _quote(text)
    return text if parsed else _quote(text)


def _repair_key(text: str) -> str:
    parsed = re.fullmatch(QUOTED, text, re.DOTALL) or parse(f"x={{{text}: 0}}")
    return text if parsed and not (hasattr(parsed, "value") and misread(parsed)) else _quote(text)


def _split(text: str) -> list[str]:
    """The items between the commas that are outside of quotes and of brackets; between all, if brackets do not pair."""
    commas, depth, least = [], 0, 0
    for found in re.finditer(rf"(?<![^\s,:\[{{])(?:{QUOTED})|[][(){{}},]", text, re.DOTALL):
        depth += (found[0] in "[({") - (found[0] in "])}")
        least = min(least, depth)
        if found[0] == "," and depth == 0:
            commas.append(found.start())
    if depth or least < 0:
        commas = [found.start() for found in re.finditer(",", text)]
    items = [text[start:end].strip() for start, end in zip([0, *(at + 1 for at in commas)], [*commas, len(text)])]
    return list(filter(None, items))


def _split_item(text: str) -> tuple[str, str]:
    """The name and the value of an item of a mapping, ``NAME: VALUE``."""
    quoted = re.match(rf"({QUOTED})\s*:", text, re.DOTALL)
    if quoted:
        return quoted[1], text[quoted.end() :].strip()
    middle = text.find(": ") if text.count(": ") == 1 else text.rfind(":")
    return text[:middle].strip(), text[middle + 1 :].strip()
