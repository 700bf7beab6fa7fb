"""What compiling gains on this machine: measured once, and kept beside the compiled code for all runs of a user."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.engine.budget import Budget
from flowtrain.engine.compiling import Compilation, compile_and_try, signature, use_cache
from flowtrain.engine.timing import own_seconds_of
from flowtrain.flow import Flow
from flowtrain.runtime import distributed, environment, files

MARGIN = 1.2  # a compilation repays if it saves so many times what it takes
STEPS = 10  # that are timed, after one that is not


@dataclass(frozen=True)
class Gain:
    """Attributes:
    eager, compiled: seconds of a training step without its optimizer, on a machine that does nothing else.
    compiling: seconds of the first compiled step, in which the code is found in the cache, or compiled on a GPU.
    threads: with which the compiled step is fastest.
    """

    eager: float
    compiled: float
    compiling: float
    threads: int

    def repays(self, budget: Budget, step: int = 0, seconds: float = 0.0) -> bool:
        """Whether a run that has come to ``step`` after ``seconds`` takes more steps in its time compiled, or less
        time for its steps."""
        return budget.left(step, seconds, self.eager) * (self.eager - self.compiled) > MARGIN * self.compiling

    def __str__(self) -> str:
        steps = f"a gradient takes {1000 * self.eager:.1f} ms, compiled {1000 * self.compiled:.1f} ms"
        return f"{steps}, and compiling {self.compiling:.0f} s"


def measure(flow: Flow, step: Callable[[], object], whole: bool, threads: list[int]) -> tuple[Compilation, Gain]:
    """Compile ``flow``, and what that gains in ``step``, a gradient of it, over the fastest of several numbers of
    ``threads``, the largest first. Compiled, which takes time for each, only the first two are tried; the faster stays.
    On a CPU it is compiled twice, since other runs find the code in the cache, which takes seconds.

    Raises:
        UsageError: as in compile_and_try.
    """
    device, found = next(flow.parameters()).device, []
    if device.type == "cpu":
        compile_and_try(flow, step, whole).undo()
        torch.compiler.reset()
    compiling = own_seconds_of(lambda: found.append(compile_and_try(flow, step, whole)), device)
    compilation: Compilation = found[0]
    compiled = {number: fastest(flow, step, [number]) for number in threads[:2]}
    with compilation.pause():
        eager = fastest(flow, step, threads)
    best = min(compiled, key=compiled.get)
    torch.set_num_threads(best)
    return compilation, Gain(eager, compiled[best], compiling, best)


def fastest(flow: Flow, step: Callable[[], object], threads: list[int]) -> float:
    """Seconds of a ``step`` that nothing else on the machine slowed down, with the best of several numbers of threads,
    of which the first stays."""
    device, times = next(flow.parameters()).device, []
    for number in reversed(threads):
        torch.set_num_threads(number)
        step()  # which may compile
        times += [own_seconds_of(step, device) for _ in range(STEPS)]
    return min(times)


class Known:
    """The gain of one flow in one setting, as it is known on this machine.

    Args:
        flow: in training mode.
        x: a batch as the flow gets it.
        setting: what else the compiled code depends on.
    """

    def __init__(self, flow: Flow, x: Tensor, *setting: object):
        cache = use_cache()
        parts = signature(flow), tuple(x.shape), x.dtype, setting, _machine(x.device), _code(), str(cache)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        self.folder = cache / "flowtrain"  # beside the code: who deletes it deletes this
        self.file, self.job = self.folder / f"{key}.json", self.folder / f"{key}.job"

    def read(self) -> Gain | str | None:
        """The gain, or why the flow cannot be compiled, or None."""
        try:
            found = json.loads(self.file.read_bytes())
            return found["error"] if "error" in found else Gain(**found)
        except (OSError, ValueError, TypeError):
            return None

    def write(self, found: Gain | str) -> None:
        with suppress(OSError, files.WriteError):  # a cache
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.write_json(self.file, {"error": found} if isinstance(found, str) else asdict(found))

    @contextmanager
    def lock(self) -> Iterator[int | None]:
        """The lock of the one process that measures, as a file descriptor; None where another has it.

        Raises:
            OSError: the cache cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.folder / "lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield file.fileno()

    def note_compiling(self, gain: Gain, seconds: float) -> None:
        """Note how long compiling took this time, if nothing slowed it down."""
        if seconds < gain.compiling:
            self.write(replace(gain, compiling=seconds))


def _machine(device: torch.device) -> tuple:
    name = environment.device_name(device), environment.processor()
    return *name, distributed.cores(), torch.get_num_threads(), torch.__version__


def _code() -> str:
    """A digest of the package's code: other code may be compiled to other programs."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for part in ("bijections", "nets", "runtime", "distributions.py", "flow.py", "engine/compiling.py"):
        for file in sorted((folder / part).rglob("*.py")) if (folder / part).is_dir() else [folder / part]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
