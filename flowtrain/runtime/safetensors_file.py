"""A checkpoint's weights and configuration as a safetensors file, which holds no code and opens without flowtrain."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from flowtrain.errors import FlowtrainError, UsageError

SUFFIX = ".safetensors"
KEY = "flowtrain"  # in the file's metadata: a JSON mapping of the names in RECORD
RECORD = ("config", "columns", "weights", "version")


def check_installed() -> None:
    """Raise UsageError where the package is missing."""
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError("safetensors: it needs one more package: pip install 'flowtrain[export]'") from error


def to_bytes(tensors: dict[str, Tensor], record: dict) -> bytes:
    """The contents of a file with a flow's state and ``record``, with the keys of :data:`RECORD`."""
    check_installed()
    from safetensors.torch import save

    # copies: the format has no tensors that share memory
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(own, {"format": "pt", KEY: json.dumps({name: record[name] for name in RECORD})})


def read(path: Path) -> dict:
    """What :func:`flowtrain.runtime.checkpoint.read` returns of a checkpoint with these weights.

    Raises:
        FlowtrainError: the file is damaged, or not written by flowtrain.
    """
    check_installed()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get(KEY)
            if record is None:
                raise FlowtrainError(f"{path}: no configuration of flowtrain in it; 'flowtrain export' writes one")
            record = json.loads(record)
            if not isinstance(record, dict) or {*record} != {*RECORD}:
                raise ValueError("its metadata are not flowtrain's")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise FlowtrainError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise FlowtrainError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return {"config": record["config"], "columns": record["columns"], "model": tensors, "ema": None}
