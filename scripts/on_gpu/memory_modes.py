"""What memory=checkpoint and memory=reversible save, and whether their gradients are right."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flowtrain.engine.audit import perturb
from flowtrain.engine.peak import peak_bytes
from on_gpu.machine import seconds_of
from on_gpu.part import Part, Place, number, verdict
from on_gpu.training import launches, trainer_of

GLOW = "model=glow dataset=synthetic dataset.image_size=32 model.levels=1 model.steps=32 model.hidden=128".split()
LIMITS = {  # of the relative error of a parameter's gradient
    ("checkpoint", "float32"): 0.0,
    ("checkpoint", "bfloat16"): 0.0,
    ("reversible", "float32"): 1e-3,
    ("reversible", "bfloat16"): 0.1,
}


def mode(place: Place, memory: str, precision: str) -> dict:
    """Peak bytes and time of a gradient of 32 Glow steps, and its greatest error beside that of memory=none."""
    peak, seconds, gradients = gradient(place, memory, precision)
    figures = {"MiB": peak / 2**20, "ms": 1e3 * seconds}
    if memory == "none":
        return figures
    _, _, expected = gradient(place, "none", precision)
    pairs = [(mine, true) for mine, true in zip(gradients, expected, strict=True) if true.norm() > 0]
    error = max(((mine - true).norm() / true.norm()).item() for mine, true in pairs)
    return {**figures, "error": error, "passed": error <= LIMITS[memory, precision]}


def gradient(place: Place, memory: str, precision: str) -> tuple[int, float, list[Tensor]]:
    """Peak bytes, seconds, and the gradients of all parameters."""
    small = ["smoke=true", "dataset.image_size=8"] if place.tiny else ["batch_size=64"]
    words = [f"memory={memory}", f"precision={precision}", "deterministic=true", "compile=false", "trainer.clip=null"]
    trainer = trainer_of(place, *GLOW, *small, *words, *launches(graph=False))
    batch = next(trainer.loader.batches())
    torch.manual_seed(1)
    with torch.no_grad():
        perturb(trainer.flow, batch.x)
    trainer.gradient(batch)  # what is allocated once
    peak = peak_bytes(lambda: trainer.gradient(batch), place.device)
    seconds = seconds_of(place, lambda: trainer.gradient(batch), 0.0 if place.tiny else 0.3)
    return peak, seconds, [parameter.grad.clone() for parameter in trainer.flow.parameters()]


PART = Part(
    "memory modes",
    "A gradient of 32 Glow steps with hidden=128 on 64 images of 32×32: peak memory, time, and the greatest relative "
    "error of a parameter's gradient beside memory=none.",
    {
        f"memory={memory}, {precision}": partial(mode, memory=memory, precision=precision)
        for precision in ("float32", "bfloat16")
        for memory in ("none", "checkpoint", "reversible")
    },
    {
        "peak MiB": number("MiB", ",.0f"),
        "ms": number("ms"),
        "error": number("error", ".1g"),
        "passed": lambda row: verdict(row) if "passed" in row else "–",
    },
    seconds=150,
    rehearsed=("memory=none, float32", "memory=checkpoint, float32", "memory=reversible, float32"),
)
