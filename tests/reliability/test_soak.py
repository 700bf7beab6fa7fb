"""Promise 14: a long run needs no more memory and open files over time, and its records can be read at any time."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from flowtrain.runtime import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TRAIN = (
    "train",
    "model=nice",
    "dataset=moons",
    "model.hidden=8",
    "batch_size=8",
    "compile=false",
    "max_minutes=null",
    "trainer.log_every=20",
    "trainer.val_every=100",
    "trainer.val_examples=16",
    "trainer.save_every=100",
    "trainer.sample_every=500",
    "trainer.init_batch=64",
    "dataset.rows=2000",
)
WARM_UP = 0.3  # share of the run in which caches fill; the first image of the shortest is drawn at 0.25
DRIFT = 4.0  # MiB of growth over the rest of the run that may be noise


def resident_memory(pid: int) -> float:
    """The resident memory of a process in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def read_records(run: Path) -> int:
    """Read all records, except for a line that is being written, and return their last step."""
    events = [event.step for file in run.glob("tb/events.*") for event in EventFileLoader(str(file)).Load()]
    *lines, _ = (run / "metrics.jsonl").read_text().split("\n")
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and max(events, default=0) <= max(steps, default=0)
    return steps[-1] if steps else 0


def watch(process, folder: Path, pause: float) -> list[tuple[int, float, int]]:
    """Read the records, the checkpoint, the memory and the open files of a run until it ends: step, MiB and files."""
    readings = []
    while process.poll() is None:
        for file in folder.glob("outputs/*/*/checkpoints/last.pt"):
            with suppress(FileNotFoundError, ProcessLookupError):  # the process may end here
                files, memory = len(os.listdir(f"/proc/{process.pid}/fd")), resident_memory(process.pid)
                readings.append((read_records(file.parent.parent), memory, files))
            checkpoint.read(file)
        time.sleep(pause)
    return readings


def test_memory_and_open_files_stay_constant(tmp_path, count, promise):
    steps = count(20_000)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flowtrain", *TRAIN, f"max_steps={steps}"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        readings = watch(process, tmp_path, pause=steps / 20_000)
    finally:
        process.kill()
    assert process.wait() == 0, (tmp_path / "out").read_text()
    (run,) = tmp_path.glob("outputs/*/*")
    assert read_records(run) == steps and json.loads((run / "summary.json").read_text())["steps"] == steps
    step, memory, files = np.array([one for one in readings if WARM_UP * steps < one[0] < steps]).T
    (slope, level), covariance = np.polyfit(step, memory, 1, cov=True)
    rest = (1 - WARM_UP) * steps
    rise, noise = slope * rest, 2 * covariance[0, 0] ** 0.5 * rest
    promise(
        14,
        f"memory from step {WARM_UP * steps:.0f} to {steps} of a run with every interval firing: flat",
        f"{rise:+.2f} ± {noise:.2f} MiB of {level:.0f}, {len(step)} readings",
    )
    promise(14, "open files meanwhile", f"{int(files.min())} to {int(files.max())}")
    promise(
        14,
        "readings of metrics.jsonl, TensorBoard's events and last.pt meanwhile",
        f"{len(readings)} of {len(readings)}",
    )
    assert len(step) >= 8
    assert rise - noise < DRIFT and memory[-len(memory) // 4 :].mean() - memory[: len(memory) // 4].mean() < 2 * DRIFT
    assert files.max() - files.min() <= 3  # a checkpoint and an image that are being written
