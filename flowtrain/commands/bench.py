"""``flowtrain bench``: what flowtrain costs beside other people's libraries and bare networks, on this machine."""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from flowtrain import __version__
from flowtrain.benchmarks import SUITES, peers, report
from flowtrain.benchmarks.session import Session
from flowtrain.commands import BenchConfig
from flowtrain.engine.precision import set_tf32
from flowtrain.runtime import distributed, environment, files, native


def main(config: BenchConfig, run_dir: str) -> dict:
    """Run the suites of ``config``; print a table (or JSON) and write bench.json and bench.png.

    Raises:
        FlowtrainError: something that would be timed is not exact.
    """
    if not distributed.is_main():
        return {}
    if config.plot:
        report.need_plots()
    device = distributed.device()
    torch.set_num_threads(config.threads)
    set_tf32("float32")
    present, absent = peers.import_installed(config.peers)
    session = Session(config.seed, config.rounds, config.seconds, config.compile, config.smoke, device, present)
    if absent:
        session.say(f"not installed, so left out: {', '.join(absent)} ({peers.INSTALL})")
    start, before = time.time(), _load()
    cores = distributed.cores()
    short = "" if cores >= config.threads else ": fewer cores than threads, so the figures are of no use"
    session.say(f"load {before:.2f}, {config.threads} threads on {cores} core{'s' * (cores > 1)}{short}")
    session.say(f"C++ functions for the CPU: {native.status()}")
    rows = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.\w+ is deprecated")  # in peers
        for suite in SUITES if config.suite == "all" else [config.suite]:
            torch.manual_seed(config.seed)
            for row in importlib.import_module(f"flowtrain.benchmarks.{SUITES[suite]}").rows(session):
                rows.append({**asdict(row), "reached": row.reached})
                session.say("  ".join(report.cells(rows[-1])))
    found = {
        "date": time.strftime("%Y-%m-%d", time.localtime(start)),
        "command": " ".join(["flowtrain", "bench", *_words(config)]),
        "flowtrain": __version__,
        "torch": torch.__version__,
        "peers": peers.versions(present),
        "absent": absent,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "processor": environment.processor(),
        "platform": platform.platform(),
        "cores": cores,
        "threads": config.threads,
        "c++": native.status(),
        "precision": "float32",
        "rounds": config.rounds,
        "seconds_a_comparison": config.seconds,
        "seed": config.seed,
        "load": {"before": before, "after": _load()},
        "seconds": round(time.time() - start, 1),
        "rows": rows,
        "parameters": session.parameters,
        "exactness": session.exactness,
    }
    files.write_json(Path(run_dir) / "bench.json", found)
    if config.plot:
        report.plot(rows, Path(run_dir) / "bench.png")
    print(json.dumps(found, indent=2) if config.json else report.table(rows), flush=True)
    session.say(f"load {found['load']['after']:.2f} after {found['seconds']:.0f} s; {run_dir}/bench.json")
    return {}


def _load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def _words(config: BenchConfig) -> list[str]:
    return [
        f"suite={config.suite}",
        f"threads={config.threads}",
        f"rounds={config.rounds}",
        f"seconds={config.seconds:g}",
    ]
