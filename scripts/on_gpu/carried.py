"""What comes with the checkout to a machine that reaches nothing else: wheels, and CIFAR-10 in two halves."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# pure Python, and not among what comes with most installations of PyTorch
WHEELS = ("hydra-core", "omegaconf", "antlr4-python3-runtime", "nflows", "zuko", "normflows", "FrEIA")
NAMES = "files.txt"  # of both halves
HOME = Path(tempfile.gettempdir()) / "flowtrain-gpu"  # outside the checkout, which each call may replace


def collect_wheels(folder: str) -> int:
    """Put a wheel of each of WHEELS, in the version that is installed here, into ``folder``."""
    wanted = [f"{name}=={version(name)}" for name in WHEELS]
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--wheel-dir", folder, *wanted])
    print(f"{folder}: {', '.join(sorted(file.name for file in Path(folder).glob('*.whl')))}")
    return done.returncode


def cut(packed: Path, folder: Path) -> int:
    """Copy ``packed``/cifar10 into ``folder``/a and ``folder``/b, with restore.py in both: halves by size."""
    files = sorted((packed / "cifar10").iterdir(), key=lambda file: -file.stat().st_size)
    for half, mine in (("a", files[::2]), ("b", files[1::2])):
        shutil.rmtree(folder / half, ignore_errors=True)
        (folder / half / "cifar10").mkdir(parents=True)
        for file in mine:
            shutil.copyfile(file, folder / half / "cifar10" / file.name)
        shutil.copyfile(packed / "restore.py", folder / half / "restore.py")
        (folder / half / NAMES).write_text("\n".join(file.name for file in files))
        size = sum(file.stat().st_size for file in mine)
        print(f"{folder / half}: {len(mine)} files, {size / 2**20:.0f} MiB")
    return 0


def unpack(folder: Path) -> Path | None:
    """Add the halves in ``folder`` to those of earlier calls; the folder that holds them once both are there."""
    packed = HOME / "packed"
    for half in sorted(folder.glob("[ab]")):
        shutil.copytree(half, packed, dirs_exist_ok=True)
    names = (packed / NAMES).read_text().split() if (packed / NAMES).exists() else []
    return packed if names and all((packed / "cifar10" / name).exists() for name in names) else None


def restore(packed: Path) -> Path:
    """The folder of CIFAR-10's own files, made from both halves."""
    root = HOME / "data"
    if not (root / "cifar-10-batches-py" / "batches.meta").exists():  # written last
        subprocess.run([sys.executable, packed / "restore.py", root, "cifar10"], check=True)
    return root
