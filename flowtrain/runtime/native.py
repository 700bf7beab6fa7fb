"""C++ functions for the CPU, built by the machine's compiler on first use and kept in the user's cache directory.

They are plain functions of pointers, called by ctypes, so that they build in a second or two: torch's own headers alone
take half a minute. Where there is no compiler, or ``FLOWTRAIN_NATIVE=0``, there are none, and layers compute with
torch's operations: :func:`load` returns None, and :func:`status` says why.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.runtime import gradients, modes

log = logging.getLogger(__name__)
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = f"-O3 -std=c++17 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -I{Path(__file__).parent}".split()
TUNINGS = [["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []]  # the first one that builds is used
PART = 1 << 12  # numbers of work, below which a thread costs more than it saves


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file; None where it cannot be built."""
    compiler, _ = find_compiler()
    if not compiler:
        return None
    try:
        target = _directory() / f"{source.stem}-{_key(source, compiler)}.so"
        if not target.exists():
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        lines = [line for line in str(getattr(error, "stderr", None) or error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        log.warning("%s cannot be built (%s): torch's operations take its place, slower", source.name, reason)
        return None


def status() -> str:
    """The compiler of C++ functions, or why there are none."""
    compiler, why = find_compiler()
    return " ".join(compiler) or f"none: {why}"


@cache
def find_compiler() -> tuple[list[str], str]:
    """The command that compiles; nothing, and why, where it does not work."""
    if os.environ.get("FLOWTRAIN_NATIVE", "1") == "0":
        return [], "FLOWTRAIN_NATIVE=0"
    command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    if not shutil.which(command[0]):
        return [], "no compiler (CXX, c++ or g++)"
    return command, ""


def _directory() -> Path:
    """Where functions are kept; where that cannot be written, a folder for the life of this process."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowtrain" / "native"
    with suppress(OSError, RuntimeError):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(path, os.W_OK):
            return path
    path = Path(tempfile.mkdtemp(prefix="flowtrain-native-"))
    atexit.register(shutil.rmtree, path, True)
    return path


def _key(source: Path, compiler: list[str]) -> str:
    """Differs where the code, the compiler or the instructions of the processor do."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        processor = platform.processor()
    code = [path.read_bytes() for path in (source, *HEADERS)]
    parts = [*code, version, " ".join([*compiler, *FLAGS]).encode(), processor.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    """Build ``target``, whole or not at all: for this processor and with threads if the compiler can."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        code, built = Path(directory) / "code.o", Path(directory) / target.name
        for tuning in TUNINGS:
            try:
                _run(*compiler, *FLAGS, *tuning, "-c", str(source), "-o", str(code))
                # not with -fopenmp, which would load a second library of threads beside torch's
                _run(*compiler, "-shared", str(code), "-o", str(built))
                ctypes.CDLL(str(built))
                break
            except (OSError, subprocess.CalledProcessError):
                if tuning is TUNINGS[-1]:
                    raise
        os.replace(built, target)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


@cache
def function(source: Path, name: str, dtype: torch.dtype, arguments: tuple) -> Callable:
    """The function ``name`` of a C++ file for numbers of ``dtype``, which takes ``arguments``, types of ctypes."""
    found = getattr(load(source), f"{name}_{NAMES[dtype]}")
    found.argtypes, found.restype = arguments, None
    return found


def applies(*tensors: Tensor) -> bool:
    """Whether a C++ function may compute with ``tensors``."""
    for one in tensors:
        if one.dtype not in NAMES:
            return False
    return in_memory(*tensors)


def in_memory(*tensors: Tensor) -> bool:
    """Whether ``tensors`` are numbers in the CPU's memory, which nothing but autograd watches."""
    for one in tensors:  # all() of a generator takes twice as long
        if type(one) not in _PLAIN or not one.is_cpu:
            return False
    return gradients.only_autograd_watches()


def as_operator(*tensors: Tensor) -> bool:
    """Whether torch.compile, which takes an operator as it is, is at work on tensors in the CPU's memory. No exported
    program has operators of ours."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or modes.current().tracing:
        return False
    for one in tensors:
        if one.dtype not in NAMES or one.device.type != "cpu":
            return False
    return True


def constant_when_compiled(function: Callable) -> Callable:
    """What ``torch.compiler.assume_constant_result`` does. That imports the compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_PLAIN = Tensor, torch.nn.Parameter
NAMES = {torch.float32: "float32", torch.float64: "float64"}


def pointer(tensor: Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def parts(count: int, work: int) -> int:
    """The number of parts of ``count`` elements of ``work`` numbers each: no more than torch has threads."""
    return max(1, min(torch.get_num_threads(), count * work // PART))
