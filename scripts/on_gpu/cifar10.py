"""``experiment=glow_cifar10`` for the minutes that are left: the commands that a user types."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from on_gpu import carried
from on_gpu.part import NotHere, Part, Place, number
from on_gpu.resuming import finish, start

AFTER = 65  # seconds for the evaluation and the samples
WORDS = (
    "experiment=glow_cifar10 precision=bfloat16 compile=true trainer.max_epochs=null trainer.warmup_epochs=1 "
    "trainer.ema=0.999 scheduler=linear trainer.val_every=500 trainer.sample_every=100000 trainer.save_minutes=60 "
    "trainer.save_every=100000 report=false hydra.run.dir=run"
).split()
TINY = "compile=false precision=float32 smoke=true dataset=synthetic dataset.image_size=8".split()


def train(place: Place) -> dict:
    """Train, evaluate on the test split and draw samples."""
    data = TINY if place.tiny else [f"dataset.root={root(place)}", "dataset.download=false"]
    minutes = 1 if place.tiny else max(0.2, (place.end - time.time() - AFTER) / 60)
    finish(place, start(place, "train", *WORDS, *data, f"max_minutes={minutes:.2f}"))
    where = [] if place.tiny else data
    report = json.loads(last_object(finish(place, start(place, "eval", "ckpt=run", "json=true", *where))))
    summary = json.loads((place.folder / "run" / "summary.json").read_text())
    finish(place, start(place, "sample", "ckpt=run", "n=64", "temperature=0.7"))
    keep(place.folder)
    return {
        "bits": report["bits_per_dim"],
        "stderr": report["bits_per_dim_stderr"],
        "examples": report["examples"],
        "steps": summary["steps"],
        "train_seconds": summary["seconds"],
    }


def root(place: Place) -> Path:
    """The folder with CIFAR-10. Raises NotHere without one."""
    folder = Path(os.environ.get("FLOWTRAIN_DATA", "data"))
    if (folder / "cifar-10-batches-py").is_dir():
        return folder.absolute()
    if place.data is None:
        raise NotHere("needs CIFAR-10 in FLOWTRAIN_DATA, or both halves of .gpu")
    return carried.restore(place.data)


def last_object(text: str) -> str:
    """The JSON object at the end of what a command printed."""
    return text[text.rindex("\n{\n") if "\n{\n" in text else text.index("{") :]


def keep(folder: Path) -> None:
    """Copy the log, the metrics and the samples beside the results, where $OUT says so."""
    if not (out := os.environ.get("OUT")):
        return
    for file in (folder / "run" / "train.log", folder / "run" / "metrics.jsonl", *folder.rglob("samples.png")):
        Path(out, f"cifar10_{file.name}").write_bytes(file.read_bytes())


PART = Part(
    "cifar10",
    "`experiment=glow_cifar10` in bfloat16, compiled, with one epoch of warm-up, a linear decay and an average of the "
    "weights, for the minutes that were left: bits/dim on the test split.",
    {"glow_cifar10": train},
    {
        "test bits/dim": lambda row: f"{row['bits']:.3f} ± {row['stderr']:.3f}",
        "steps": number("steps", ",d"),
        "seconds of training": number("train_seconds", ".0f"),
    },
    seconds=220,
    last=True,
)
