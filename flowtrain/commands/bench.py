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
from flowtrain.runtime import distributed, files


def main(cfg, run_dir: str) -> dict:
    """Run the suites of ``cfg``; print a table (or JSON) and write bench.json and bench.png.

    Raises:
        FlowtrainError: something that is to be timed is not exact.
    """
    if not distributed.is_main():
        return {}
    if cfg.plot:
        report.need_plots()
    device = distributed.device()
    torch.set_num_threads(cfg.threads)
    found, absent = peers.present(list(cfg.peers))
    session = Session(cfg.seed, cfg.rounds, cfg.seconds, cfg.compile, cfg.smoke, device, found)
    if absent:
        session.say(f"not installed, so left out: {', '.join(absent)} ({peers.INSTALL})")
    began, before = time.time(), _load()
    cores = distributed.cores()
    short = "" if cores >= cfg.threads else ": fewer cores than threads, and figures of no use"
    session.say(f"load {before:.2f}, {cfg.threads} threads on {cores} core{'s' * (cores > 1)}{short}")
    rows = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.\w+ is deprecated")  # in peers
        for suite in SUITES if cfg.suite == "all" else [cfg.suite]:
            torch.manual_seed(cfg.seed)
            for row in importlib.import_module(f"flowtrain.benchmarks.{SUITES[suite]}").rows(session):
                rows.append({**asdict(row), "reached": row.reached})
                session.say("  ".join(report.cells(rows[-1])))
    found = {
        "date": time.strftime("%Y-%m-%d", time.localtime(began)),
        "command": " ".join(["flowtrain", "bench", *_words(cfg)]),
        "flowtrain": __version__,
        "torch": torch.__version__,
        "peers": peers.versions(found),
        "absent": absent,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "platform": platform.platform(),
        "cores": cores,
        "threads": cfg.threads,
        "rounds": cfg.rounds,
        "seconds_a_comparison": cfg.seconds,
        "seed": cfg.seed,
        "load": {"before": before, "after": _load()},
        "seconds": round(time.time() - began, 1),
        "rows": rows,
        "parameters": session.parameters,
        "exactness": session.exactness,
        "compile_seconds": session.compile_seconds,
    }
    files.write_json(Path(run_dir) / "bench.json", found)
    if cfg.plot:
        report.plot(rows, Path(run_dir) / "bench.png")
    print(json.dumps(found, indent=2) if cfg.json else report.table(rows), flush=True)
    session.say(f"load {found['load']['after']:.2f} after {found['seconds']:.0f} s; {run_dir}/bench.json")
    return {}


def _load() -> float:
    """Processes that ran or waited to, on the average of the last minute."""
    return os.getloadavg()[0]


def _words(cfg) -> list[str]:
    return [f"suite={cfg.suite}", f"threads={cfg.threads}", f"rounds={cfg.rounds}", f"seconds={cfg.seconds:g}"]
