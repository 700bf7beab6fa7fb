"""``ckpt=``, ``resume=`` and ``replay=`` on a command line: paths become options that hold a configuration."""

from __future__ import annotations

import os
import sys
from functools import partial

from flowtrain.errors import UsageError


def restored(command: str, overrides: list[str], stub: bool, running: bool) -> tuple[str, list[str]]:
    """The root configuration, and the overrides with checkpoints' paths replaced by options that hold their configs.

    Without ``ckpt=``, commands take the run that started last, and say which; or none, where a ``stub`` will do. But
    check takes a new model where a group, such as ``model=``, asks for one.
    """
    from flowtrain.config import restore, runs

    if command == "bench":  # of no run
        return command, overrides
    key = "resume" if command == "train" else "ckpt"
    if command == "check" and any(word.startswith("replay=") for word in overrides):
        key = "replay"
    given = next((word for word in overrides if word.startswith(f"{key}=")), None)
    paths = _values(given, key) if given else []
    others = [word for word in overrides if word != given]
    if key == "replay" and any(word.startswith("ckpt=") for word in others):
        raise UsageError("give ckpt= or replay=, not both")
    if command == "train" and all(not isinstance(path, str) for path in paths):
        return "train", overrides
    from flowtrain.cli.overrides import check_names, parse

    parsed = parse(others)
    if command == "check" and not given and (stub or any(_builds(item.key_or_group) for item in parsed)):
        return "check_model", overrides
    keys = {item.key_or_group: item.value() for item in parsed if not item.is_sweep_override()}
    allow = keys["allow"] if isinstance(keys.get("allow"), list) else []
    if not stub:
        check_names(command, others)
    if key == "replay":
        files = [runs.recorded(path) for path in paths]
    elif given:
        find = runs.given_to_continue if command == "train" else partial(runs.checkpoint_in, key=key)
        files = [find(path) for path in paths]
    elif stub:
        return command, [f"{key}={restore.stub(key)}", *others]
    else:
        files = [runs.last_started()]
        out = sys.stdout if running and not keys.get("json") else sys.stderr
        print(f"ckpt={os.path.relpath(files[0])}", file=out, flush=True)
    options = ",".join(restore.as_option(key, file, allow) for file in files)
    return (command if key == "ckpt" else key), [f"{key}={options}", *others]


def _builds(group: str) -> bool:
    """Whether choosing an option of ``group`` builds another flow than a checkpoint's."""
    from flowtrain.config.compose import conf_dir

    return group not in ("hydra", "launcher") and (conf_dir() / group).is_dir()


def _values(word: str, key: str) -> list:
    """The value of ``key=value``: as it stands where such a path exists, else by Hydra's grammar, a sweep as a list."""
    from hydra.errors import HydraException

    from flowtrain.cli.overrides import parse

    text = word.partition("=")[2]
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    item = parse([word])[0]
    if not item.is_sweep_override():
        return [item.value()]
    try:
        return [str(value).strip("'\"") for value in item.sweep_iterator()]
    except HydraException as error:  # glob(), interval()
        raise UsageError(f"'{word}' does not list its values: write {key}=a,b") from error
