"""Suite ``commands``: ``sample``, ``score``, ``eval`` and a step of ``train`` against the same work in Python, and what
memory sampling needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowtrain.benchmarks.session import Load, Row, Session, clock, per_second, row
from flowtrain.benchmarks.start_up import environment
from flowtrain.benchmarks.timing import MIN_ROUNDS, Spread, Times
from flowtrain.errors import FlowtrainError

TIME, MEMORY, STEP = 1.2, 1.1, 1.1
STEPS = [("dataset=moons", "model=nsf_coupling"), ("dataset=moons", "model=maf"), ("dataset=digits", "model=glow")]
ROWS, FEW = 500_000, 2  # what a command does with few rows is its start-up
MEMORY_ROWS = 1_000_000, 100_000
LIBRARY = """
import json, sys, time
import numpy as np, torch
from flowtrain import load

run, rows = sys.argv[1:]
flow, x = load(run), torch.from_numpy(np.load(rows))

def seconds(work):
    with torch.no_grad():
        work(1000)
        start = time.perf_counter()
        work(len(x))
    return time.perf_counter() - start

print(json.dumps({"sample": seconds(flow.sample), "log_prob": seconds(lambda n: flow.log_prob(x[:n]))}))
"""


def rows(session: Session) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        count = 1000 if session.smoke else ROWS
        runner.train(count, session.seed)
        words = {  # command -> with few rows, with all, and what does the same in Python
            "sample": ([f"n={FEW}", "plot=false"], [f"n={count}", "plot=false"], "sample"),
            "score": (["input=few.npy"], ["input=rows.npy"], "log_prob"),
            "eval": (["split=train", f"examples={FEW}"], ["split=train", "examples=null"], "log_prob"),
        }
        yield from _time_rows(session, runner, words, count)
        most, least = (count, count // 10) if session.smoke else MEMORY_ROWS
        peaks = [runner.run("sample", f"n={n}", "plot=false").peak for n in (most, least)]
        amounts = tuple(f"{peak / 2**20:.3g} MiB" for peak in peaks)
        work = f"peak memory of sampling {most:,} rows to {least:,}"
        value = peaks[0] / peaks[1]
        yield Row("commands", work, f"{most:,} rows", f"{least:,} rows", value, 0.0, MEMORY, amounts=amounts)
        for chosen in STEPS:
            times = runner.step_times(session, *chosen)
            yield row("commands", f"a training step of {' '.join(chosen)}", times, "flowtrain train", "bare loop", STEP)


def _time_rows(session: Session, runner: Runner, words: dict, count: int) -> Iterator[Row]:
    ratios, mine, theirs, starts = ({command: [] for command in words} for _ in range(4))
    start = time.perf_counter()
    for done in range(1 if session.smoke else session.rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > session.seconds:
            break
        library = runner.library()
        for command in session.order.sample(list(words), len(words)):
            few, every, work = words[command]
            whole, start_up = (runner.run(command, *these).seconds for these in (every, few))
            seconds = whole - start_up
            starts[command].append(start_up)
            mine[command].append(seconds)
            theirs[command].append(library[work])
            ratios[command].append(seconds / library[work])
    for command, (_, _, work) in words.items():
        found = Spread.of(ratios[command])
        seconds = [Spread.of(times[command]).median for times in (mine, theirs)]
        what = f"flowtrain {command} of {count:,} rows, without its start"
        yield Row(
            "commands",
            what,
            "flowtrain",
            f"flow.{work}",
            found.median,
            found.half_range,
            TIME,
            amounts=tuple(map(clock, seconds)),
            rate=per_second(Load(count, "rows"), seconds[0]),
        )
    start_up = Spread.of(starts["eval"])
    what = f"flowtrain eval of {FEW} rows, start and end"
    yield Row("commands", what, "flowtrain", None, start_up.median, start_up.half_range, None, unit="s")


@dataclass(frozen=True)
class Finished:
    """The seconds and the peak resident bytes of a process."""

    seconds: float
    peak: int


class Runner:
    """Runs commands and Python in ``folder``, each in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def train(self, count: int, seed: int) -> None:
        """Train an autoregressive spline flow of two columns on ``count`` rows for a few steps."""
        x = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
        np.save(self.folder / "rows.npy", x)
        np.save(self.folder / "few.npy", x[:FEW])
        data = [
            "dataset=table",
            f"dataset.path={self.folder}/rows.npy",
            "dataset.val_size=100",
            "dataset.test_size=100",
        ]
        steps = ["max_steps=3", "logger=none", f"hydra.run.dir={self.folder}/run"]
        self._finish("-m", "flowtrain", "train", "model=nsf_autoregressive", *data, *steps)

    def run(self, command: str, *words: str) -> Finished:
        """Run a command on the trained flow."""
        return self._finish("-m", "flowtrain", command, "ckpt=run", f"dataset.path={self.folder}/rows.npy", *words)[0]

    def library(self) -> dict[str, float]:
        """The seconds of the same work in Python."""
        return json.loads(self._finish("-c", LIBRARY, "run", "rows.npy")[1])

    def step_times(self, session: Session, *words: str) -> Times:
        """The seconds of a training step as ``flowtrain train WORDS`` takes it, and of a bare loop, in turns."""
        limits = [f"rounds={1 if session.smoke else session.rounds}", f"seconds={session.seconds}"]
        small = ["smoke=true"] if session.smoke else []
        module = "flowtrain.training.step_time"
        return json.loads(self._finish("-m", module, *limits, f"seed={session.seed}", *words, *small)[1])

    def _finish(self, *words: str) -> tuple[Finished, str]:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.folder,
                env={**environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())},
                stdout=output,
                stderr=errors,
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                errors.seek(0)
                why = (errors.read().splitlines() or [f"exit code {process.returncode}"])[-1]
                raise FlowtrainError(f"bench: {' '.join(words[1:])} failed: {why}")
            output.seek(0)
            unit = 1 if sys.platform == "darwin" else 1024
            return Finished(seconds, usage.ru_maxrss * unit), output.read()
