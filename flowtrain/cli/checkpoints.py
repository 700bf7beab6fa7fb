"""``ckpt=``, ``resume=`` and ``replay=`` on a command line: paths become options that hold a configuration."""

from __future__ import annotations

import os
import sys

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException

from flowtrain.cli.checks import check_names
from flowtrain.cli.overrides import parse
from flowtrain.commands import Command
from flowtrain.config import runs
from flowtrain.config.compose import conf_dir
from flowtrain.config.conversion import format_value
from flowtrain.errors import UsageError

FIND = {  # key -> the checkpoint that its value names
    "ckpt": lambda path: runs.checkpoint_in(path, "ckpt"),
    "resume": runs.checkpoint_to_resume,
    "replay": runs.divergence_record,
    "run": runs.run_to_repeat,
}


def open_checkpoints(command: Command, words: list[str], placeholder: bool = False) -> tuple[str, list[str]]:
    """The root configuration, and the words with checkpoints' paths replaced by options that hold their configurations.

    Without ``ckpt=``, a command takes the run that started last and prints which; or a ``placeholder``, which opens
    nothing. A command that can build a new flow does so where a word chooses a group, such as ``model=``.
    """
    named = [word for word in words if _names_checkpoint(command, word)]
    others = [word for word in words if word not in named]
    if len(named) > 1:
        raise UsageError(f"give one of these, not both: {' '.join(named)}")
    if command.root and not named:
        if "ckpt" not in command.on_checkpoint or placeholder or any(_chooses_flow(item) for item in parse(words)):
            return command.root, words
    key = named[0].partition("=")[0] if named else next(iter(command.on_checkpoint))
    if placeholder and not named:
        ConfigStore.instance().store(group=key, name="PATH", node={key: "PATH"}, package="_global_")
        return command.on_checkpoint[key], [f"{key}=PATH", *others]
    check_names(command, others)
    parsed = parse(others)
    values = {item.key_or_group: item.value() for item in parsed if not item.is_sweep_override()}
    remember = not any(item.key_or_group in ("dataset.root", "dataset.path") for item in parsed)
    allow = values["allow"] if isinstance(values.get("allow"), list) else []
    if named:
        files = [FIND[key](format_value(path)) for path in _values(named[0])]
    else:
        files = [runs.newest_checkpoint() if key == "ckpt" else runs.newest_to_repeat()]
        out = sys.stderr if runs.dry_run or values.get("json") else sys.stdout
        print(f"{key}={os.path.relpath(files[0])}", file=out, flush=True)
    from flowtrain.config import restore  # imports torch, which a mistake in a word should not wait for

    options = ",".join(restore.store_option(key, file, allow, remember) for file in files)
    return command.on_checkpoint[key], [f"{key}={options}", *others]


def _names_checkpoint(command: Command, word: str) -> bool:
    """Whether a word is ``KEY=PATH``. Where a command can do without a checkpoint, true and null are not paths."""
    if word.partition("=")[0] not in command.on_checkpoint:
        return False
    return not command.root or any(value is not None and not isinstance(value, bool) for value in _values(word))


def _chooses_flow(item) -> bool:
    """Whether an override chooses an option of a group that describes a flow or its training."""
    group = item.key_or_group
    return group not in ("hydra", "launcher", "sweep") and (conf_dir() / group).is_dir()


def _values(word: str) -> list:
    """The values of ``KEY=VALUE``: the text itself where such a path exists, else by Hydra's grammar."""
    key, _, text = word.partition("=")
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    item = parse([word])[0]
    if not item.is_sweep_override():
        return [item.value()]
    try:
        return [str(value).strip("'\"") for value in item.sweep_iterator()]
    except HydraException as error:  # glob(), interval()
        raise UsageError(f"'{word}' does not list its values: write {key}=a,b") from error
