"""The configurations of runs, as dotted keys that can be laid side by side."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint

# keys of places, processes and records, which do not change what a run learns
ASIDE = ("resume", "devices", "threads", "allow", "dist", "job_timeout", "logger", "hydra", "published")
ASIDE_NESTED = ("dataset.root", "dataset.download", "dataset.found")


def recorded_keys(run: Path | None, file: Path | None) -> dict[str, str]:
    """Dotted key -> value as a person types it, of a run's checkpoint, else of Hydra's record in ``run``; {} without
    either. A class or a family stands under the key of its node, ``model: glow``, without the modules before it, a data
    set's name under ``dataset``.

    Raises:
        FlowtrainError: that cannot be read.
    """
    if file is not None:
        return _flatten(_mapping(checkpoint.read_config(file), file))
    record = run / ".hydra" / "config.yaml" if run else None
    if record is None or not record.is_file():
        return {}
    try:
        # unresolved: a stranger's interpolations may do anything
        tree = OmegaConf.to_container(OmegaConf.load(record), resolve=False)
    except (OSError, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise FlowtrainError(f"{record}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return {key: value for key, value in _flatten(_mapping(tree, record)).items() if "${" not in value}


def _mapping(config, file: Path) -> dict:
    if not isinstance(config, dict):
        raise FlowtrainError(f"{file}: its configuration is no mapping")
    return config


def differing(runs: list[dict[str, str]]) -> list[str]:
    """The keys whose values differ between runs, those of the first run first.

    >>> differing([{"seed": "1", "model": "glow", "model.steps": "6"}, {"seed": "2", "model": "glow"}])
    ['seed', 'model.steps']
    """
    known = dict.fromkeys(key for run in runs for key in run)
    return [key for key in known if len({run.get(key) for run in runs if run}) > 1]


def _flatten(node: dict, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if name in ASIDE and not prefix or key in ASIDE_NESTED or name in ("_partial_", "defaults"):
            continue
        if key == "dataset.name":
            flat["dataset"] = str(value)
        elif key == "dataset._target_":
            flat.setdefault("dataset", str(value).rpartition(".")[2])
        elif name == "_target_":
            flat[prefix.rstrip(".") or name] = str(value).rpartition(".")[2]
        elif isinstance(value, dict):
            flat |= _flatten(value, f"{key}.")
        elif isinstance(value, list):
            flat[key] = "[" + ",".join(map(_text, value)) + "]"
        else:
            flat[key] = _text(value)
    return flat


def _text(value) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
