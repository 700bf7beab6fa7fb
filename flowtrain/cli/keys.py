"""Checks of keys against a composed tree: each exists and keeps the kind of its value."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from flowtrain.cli.messages import REPLACED, suggest
from flowtrain.config.conversion import format_value
from flowtrain.errors import UsageError

OPEN = ("dataset.types", "dataset.read")  # mappings to which any key may be added: a column, an option of a reader


def plain(tree: DictConfig) -> dict:
    """The tree as dicts, without Hydra's node and with its interpolations unresolved."""
    content = OmegaConf.to_container(tree, resolve=False)
    content.pop("hydra", None)
    return content


def names(content: dict, prefix: str = "") -> list[str]:
    """Every dotted key of a plain tree, outermost first."""
    nested = [(f"{prefix}{key}.", value) for key, value in content.items() if isinstance(value, dict)]
    return [f"{prefix}{key}" for key in content] + [name for start, value in nested for name in names(value, start)]


def check_exists(key: str, content: dict, known, where: str = "") -> None:
    """Raise UsageError, with the nearest ``known`` name, for a key that a plain tree lacks."""
    node, parts = content, key.split(".")
    for number, part in enumerate(parts):
        if not isinstance(node, dict):  # inside a list or an interpolation: Hydra and the constructors check it
            return
        if ".".join(parts[:number]) in OPEN:
            return
        if part not in node and key in REPLACED:
            raise UsageError(f"{where}{key}: {REPLACED[key]}")
        if part not in node:
            raise UsageError(f"{where}no key '{key}'; {suggest(key, known)}".rstrip("; "))
        node = node[part]


def check_file(content: dict, tree: DictConfig, where: str) -> None:
    """Refuse what a file would add to ``tree``, except a part of its own: a mapping with a ``_target_``.

    Hydra itself refuses an unknown key on the command line, but merges one in a file silently.
    """
    base = plain(tree)
    known = names(base)

    def check(node: dict, prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            old = OmegaConf.select(tree, key, throw_on_missing=False)
            if old is not None or not (isinstance(value, dict) and "_target_" in value):
                check_exists(key, base, known, where)
            if isinstance(value, dict) and isinstance(old, DictConfig):
                check(value, f"{key}.")
            else:
                check_kind(key, value, old, where)

    check(content, "")


def check_kind(key: str, new, old, where: str = "") -> None:
    """Refuse a value of another kind than the one that it replaces. The schema checks the keys at the root."""
    if "." not in key or new is None or isinstance(new, str) and "${" in new or key.rpartition(".")[0] in OPEN:
        return
    if OmegaConf.is_dict(old) and not isinstance(new, dict):
        example = f"{key}.{next(iter(old), 'key')}"
        raise UsageError(f"{where}{key}={format_value(new)}: {key} is a mapping; name a key of it, as in {example}")
    if OmegaConf.is_list(old) and not isinstance(new, list):
        raise UsageError(f"{where}{key}={format_value(new)}: must be a list, such as [a,b]")
    if isinstance(new, dict | list):
        return
    if isinstance(old, bool):
        expected, fits = "true or false", isinstance(new, bool)
    elif isinstance(old, int | float):
        expected, fits = "a number", isinstance(new, int | float) and not isinstance(new, bool)
    else:
        return
    if not fits:
        raise UsageError(f"{where}{key}={format_value(new)}: must be {expected}, as in {key}={format_value(old)}")
