"""What the command line says about a mistake: suggestions, and Hydra's errors in one line."""

from __future__ import annotations

import difflib
import re

import yaml

from flowtrain.errors import FlowtrainError, UsageError


def suggest(name: str, options) -> str:
    """ "did you mean 'x'? ", or nothing."""
    last = name.rpartition(".")[2]
    near = [key for key in options if key.rpartition(".")[2] == last][:1]  # trainer.lr or lr for optimizer.lr
    near = near or difflib.get_close_matches(name, list(options), 1)
    return f"did you mean '{near[0]}'? " if near else ""


RENAMED = {("logger", "default"): "tensorboard", ("logger", "files"): "none"}  # options of earlier versions
REPLACED = {  # keys of earlier versions -> what to say now
    "trainer.tensorboard": "logger=none leaves out TensorBoard's files",
    **dict.fromkeys(("logger.metrics", "logger.images", "logger.progress"), "is part of every run; logger= adds more"),
}


def no_option(group: str, name: str, options) -> UsageError:
    if (group, name) in RENAMED:
        new = RENAMED[group, name]
        return UsageError(f"{group}={name}: is now {group}={new}, beside metrics.jsonl and samples/ of every run")
    return UsageError(f"{group}={name}: no such option; {suggest(name, options)}there are {', '.join(options)}")


def usage_error(error: BaseException) -> FlowtrainError:
    """An error of Hydra or OmegaConf as one of ours, in one line."""
    cause = error
    while cause is not None:
        if isinstance(cause, FlowtrainError):
            return cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, yaml.YAMLError):
        return UsageError(f"a YAML file cannot be read: {' '.join(str(error).split())}")
    unmatched = re.search(r"Could not override '(.*?)'.*No match in the defaults list", str(error))
    if unmatched:
        return UsageError(
            f"{unmatched[1]}: nothing here takes it; --cfg job shows what the other choices leave to choose"
        )
    lines = [line.strip().rstrip(".") for text in (error, error.__cause__) if text for line in str(text).splitlines()]
    noise = ("full_key:", "object_type=", "reference_type=", "Search path", "provider=", "To append")
    kept = [line for line in lines if line and not line.startswith(noise)]
    kept = [re.sub(r"^Interpolation key '(.*)' not found$", r"\g<0> (\${\1} is text)", line) for line in kept]
    return UsageError("; ".join(dict.fromkeys(kept)) or type(error).__name__)
