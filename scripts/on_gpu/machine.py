"""What the device itself does: large matrix products and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from flowtrain.engine.evaluate import exact_arithmetic
from on_gpu.part import Part, Place, number

PEAKS = {  # TFLOP/s of dense matrix products, as the vendor gives them, by what the device's name contains
    "H100": {"float32": 67, "tf32": 495, "bfloat16": 989},  # SXM
    "H200": {"float32": 67, "tf32": 495, "bfloat16": 989},
    "A100": {"float32": 19.5, "tf32": 156, "bfloat16": 312},
}


def peak(place: Place, precision: str) -> float | None:
    """The vendor's TFLOP/s of this device."""
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else ""
    return next((rates[precision] for key, rates in PEAKS.items() if key in name), None)


def seconds_of(place: Place, work: Callable[[], object], seconds: float = 0.3) -> float:
    """Seconds a call, once the device is warm."""
    for _ in range(3):
        work()
    place.synchronize()
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        for _ in range(4):
            work()
        place.synchronize()
        calls += 4
    return (time.perf_counter() - start) / calls


def product(place: Place, precision: str) -> dict:
    """TFLOP/s of a product of two large matrices of random numbers."""
    place.need_precision(precision)
    side = 64 if place.tiny else 8192
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.randn(2, side, side, device=place.device, dtype=kind)
    with exact_arithmetic():
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        rate = 2 * side**3 / seconds_of(place, lambda: a @ b) / 1e12
    highest = peak(place, precision)
    return {"rate": rate, "unit": "TFLOP/s", "share": rate / highest if highest else None}


def copy(place: Place) -> dict:
    """TB/s of a large copy on the device, bytes read and written."""
    numbers = torch.randn(2**10 if place.tiny else 2**30, device=place.device)
    target = torch.empty_like(numbers)
    rate = 2 * numbers.nbytes / seconds_of(place, lambda: target.copy_(numbers)) / 1e12
    return {"rate": rate, "unit": "TB/s", "share": None}


PART = Part(
    "machine",
    "What the GPU itself reaches: products of two 8192×8192 matrices of random numbers, and a copy on the device.",
    {**{f"product, {one}": partial(product, precision=one) for one in ("float32", "tf32", "bfloat16")}, "copy": copy},
    {
        "rate": lambda row: f"{row['rate']:.3g} {row['unit']}",
        "share of the vendor's peak": number("share", ".0%"),
    },
    seconds=30,
)
