"""deterministic=true: the same command twice, and stopped and resumed, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial

import torch

from flowtrain.engine.peak import tensors_in
from on_gpu.part import Part, Place, verdict

RUNS = {
    "model=glow dataset=digits": 30,
    "model=maf dataset=moons norm=batchnorm": 30,
    "model=ffjord dataset=moons": 12,
    "model=glow dataset=digits model.levels=1 compile=true": 30,
}


def start(place: Place, *words: str) -> subprocess.Popen:
    """Start ``flowtrain WORDS`` in the place's folder."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "flowtrain", *words]
    return subprocess.Popen(
        command, cwd=place.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(place: Place, process: subprocess.Popen) -> str:
    """What a command prints. Raises RuntimeError with the end of it where it fails."""
    text, _ = process.communicate(timeout=place.end - time.time())
    print(text, flush=True)
    if process.returncode:
        raise RuntimeError(f"flowtrain ended with {process.returncode}: {text.strip()[-300:]}")
    return text


def resume(place: Place, words: str, steps: int) -> dict:
    """Train three times, the third in two parts, and compare all that the last checkpoints hold."""
    plain = "deterministic=true scheduler=constant trainer.val_every=1000 report=false".split()
    plain += ["smoke=true"] if place.tiny else []
    steps = 3 if place.tiny else steps
    lengths = {"first": steps, "second": steps, "third": steps // 2}
    started = [
        start(place, "train", *words.split(), *plain, f"max_steps={length}", f"hydra.run.dir={name}")
        for name, length in lengths.items()
    ]
    for process in started:
        finish(place, process)
    finish(place, start(place, "train", "resume=third", f"max_steps={steps}"))
    first, second, third = (kept(place, name) for name in lengths)
    same = {"twice": equal(first, second), "resumed": equal(first, third)}
    return {**same, "passed": all(same.values())}


def kept(place: Place, run: str) -> list[torch.Tensor]:
    """The weights, their average and the optimizer's state in a run's last checkpoint."""
    state = torch.load(place.folder / run / "checkpoints" / "last.pt", weights_only=True, map_location="cpu")
    return [*tensors_in([state["model"], state.get("ema"), state["optimizer"]])]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


PART = Part(
    "resume",
    "`deterministic=true`: the same command twice, and stopped in the middle and resumed: equal weights, averages and "
    "optimizer states, to the bit.",
    {words: partial(resume, words=words, steps=steps) for words, steps in RUNS.items()},
    {
        "twice": lambda row: "the same" if row["twice"] else "**other**",
        "resumed": lambda row: "the same" if row["resumed"] else "**other**",
        "passed": verdict,
    },
    seconds=200,
    processes=2,
    rehearsed=("model=maf dataset=moons norm=batchnorm",),
)
