"""Suite ``start``: the seconds until the help is printed, and from the command to the first training step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from flowtrain.benchmarks.session import Row, Session
from flowtrain.benchmarks.timing import Spread
from flowtrain.errors import FlowtrainError

HELP = 0.2  # seconds
TORCH, MORE = 1.5, 1.0  # to the first step: so many times the seconds of ``import torch``, and so many seconds more


def rows(session: Session) -> Iterator[Row]:
    rounds = 2 if session.smoke else max(5, min(session.rounds, 10))
    yield _row("flowtrain --help", [_help() for _ in range(rounds + 1)][1:], HELP)  # the first warms the file cache
    rounds = 1 if session.smoke else 4
    pairs = [(_import_torch(), _first_step()) for _ in range(rounds + 1)][1:]
    torch_alone, times = zip(*pairs)
    yield _row("python -c 'import torch'", torch_alone, None)
    target = TORCH * Spread.of([*torch_alone]).median + MORE
    yield _row("flowtrain train dataset=digits, to the first step", times, target)


def _row(work: str, seconds: Sequence[float], target: float | None) -> Row:
    found = Spread.of([*seconds])
    return Row("start", work, "flowtrain", None, found.median, found.half_range, target, unit="s")


def _help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "flowtrain", "--help"], check=True, capture_output=True, env=environment())
    return time.perf_counter() - start


def _import_torch() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env=environment())
    return time.perf_counter() - start


def _first_step() -> float:
    """Start a training run and kill it after its first step: the seconds until then."""
    words = ["train", "dataset=digits", "trainer.log_every=1", "devices=1"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "flowtrain", *words],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        ) as process:
            line = ""
            for line in process.stdout:
                if line.startswith("step 1:"):
                    seconds = time.perf_counter() - start
                    process.kill()
                    return seconds
        raise FlowtrainError(f"bench: flowtrain {' '.join(words)} ended without a step: {line.strip()}")


def environment() -> dict[str, str]:
    """This process's environment without the variables of a distributed process group."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
