"""environment.json beside a result: versions, device, commit and command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from flowtrain import __version__
from flowtrain.runtime import distributed, files, native

NAME = "environment.json"
PACKAGES = ("hydra-core", "numpy", "omegaconf", "pillow", "scikit-learn", "torch", "torchdiffeq", "torchvision")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """The processor in words: its model, and the widest vectors that torch uses on it."""
    found = {}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{word} {found[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in found]
    return ", ".join([name, *numbers, torch.backends.cpu.get_cpu_capability()])


def record(directory: str, device: torch.device, **measured) -> None:
    """Write environment.json into ``directory``; ``measured``: what else was chosen on this machine."""
    files.write_json(Path(directory) / NAME, {**describe(device), **measured})


def read(run: Path) -> dict | None:
    """What :func:`record` wrote into a run directory; None where there is nothing that can be read."""
    try:
        found = json.loads((run / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def describe(device: torch.device) -> dict:
    """Versions, device, commit and command of this process."""
    return {
        "flowtrain": __version__,
        "git": _commit(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": device_name(device),
        "devices": distributed.world(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolution": torch.backends.cudnn.allow_tf32},
        "c++": native.status(),
        "processor": processor(),
        "host": platform.node(),
        "platform": platform.platform(),
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The commit of this checkout, with "-dirty" where the code differs; None without a checkout or without git."""
    try:
        found = subprocess.run(
            ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None
