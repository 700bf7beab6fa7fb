"""Suite ``start``: the seconds until the help is printed, and from the command to the first training step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from flowtrain.benchmarks.session import Row, Session
from flowtrain.benchmarks.timing import Spread
from flowtrain.errors import FlowtrainError

HELP, FIRST_STEP = 0.2, 6.0  # seconds


def rows(session: Session) -> Iterator[Row]:
    rounds = 2 if session.smoke else max(5, min(session.rounds, 10))
    yield _row("flowtrain --help", [_help() for _ in range(rounds + 1)][1:], HELP)  # the first warms the file cache
    rounds = 1 if session.smoke else 4
    times = [_first_step() for _ in range(rounds + 1)][1:]
    yield _row("flowtrain train dataset=digits, to the first step", times, FIRST_STEP)


def _row(work: str, seconds: list[float], target: float) -> Row:
    found = Spread.of(seconds)
    return Row("start", work, "flowtrain", None, found.median, found.half_range, target, unit="s")


def _help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "flowtrain", "--help"], check=True, capture_output=True, env=environment())
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
