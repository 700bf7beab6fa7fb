"""Glow at the paper's size: images a second, as the command trains it."""

from __future__ import annotations

import time
from functools import cache, partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowtrain.benchmarks import ours, peers
from flowtrain.benchmarks.training_steps import step
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.config.compose import train_config
from on_gpu import beside_others
from on_gpu.machine import peak, seconds_of
from on_gpu.part import NotHere, Part, Place, number
from on_gpu.training import launches, trainer_of, watch

PAPER = ["experiment=glow_cifar10", "dataset=synthetic", "dataset.image_size=32", "optimizer.lr=1e-6"]
TINY = ["model.steps=1", "model.hidden=8", "model.levels=1", "dataset.image_size=8", "trainer.init_batch=8"]
BATCHES, PRECISIONS = (512, 64), ("bfloat16", "tf32", "float32")
MODES = {  # name -> whether it is compiled, and launched as one CUDA graph
    "eager": (False, False),
    "compiled": (True, False),
    "graph": (False, True),
    "compiled, graph": (True, True),
}


def speed(place: Place, mode: str, precision: str, batch: int) -> dict:
    """Images a second of training."""
    compiled, graph = MODES[mode]
    if graph:
        place.need_gpu()
    words = [f"precision={precision}", f"compile={str(compiled).lower()}", *launches(graph)]
    words += TINY if place.tiny else []
    size = 8 if place.tiny else batch
    trainer = trainer_of(place, *PAPER, *words, f"batch_size={size}", log_every=3 if place.tiny else 5)
    found = watch(trainer, 0.0 if place.tiny else 2.5)
    figures = found.reports[-1][2]  # of a graph, whose launch allocates nothing, the memory that it keeps is the peak
    return {
        **rates(place, size * found.rate, precision),
        "ms": 1e3 / found.rate,
        "GiB": torch.cuda.max_memory_reserved() / 2**30 if graph else figures["system/peak_memory_mib"] / 2**10,
        "warm_up": found.warm_up,
        "recompiles": figures.get("train/recompiles"),
    }


def rates(place: Place, images: float, precision: str) -> dict:
    """Images a second, and how much of the device's arithmetic they are."""
    rate, highest = images * operations(*(TINY if place.tiny else ())) / 1e12, peak(place, precision)
    return {"images": images, "TFLOP/s": rate, "share": rate / highest if highest else None}


@cache
def operations(*words: str) -> int:
    """Floating-point operations of matrix products and convolutions for the gradient of one image."""
    config = train_config(*PAPER, *words)
    spec = build_dataset(config).spec
    flow = build_flow(config, spec, "cpu").train()
    with FlopCounterMode(display=False) as counter:
        flow(torch.zeros(1, *spec.shape)).sum().backward()
    return counter.get_total_flops()


def peer(place: Place, name: str, batch: int) -> dict:
    """Images a second of another library's Glow of the same size, as its users run it: float32 weights, and the TF32
    that torch allows by itself, for convolutions. It lacks our dequantization and learned priors."""
    present, _ = peers.import_installed([name])
    if name not in present:
        raise NotHere(f"needs {name}: {peers.INSTALL}")
    torch.manual_seed(1)
    side, hidden, levels, steps, batch = (8, 8, 1, 1, 8) if place.tiny else (32, 512, 3, 32, batch)
    flow = present[name].glow(side, hidden, levels, steps).to(place.device)
    x = torch.randn(batch, 3, side, side, device=place.device)
    flow(x[:16])
    run, began = step(flow, ours.optimizer, x), time.perf_counter()
    run()
    place.synchronize()
    warm_up = time.perf_counter() - began
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(place, run, 0.0 if place.tiny else 2.0)
    used = torch.cuda.max_memory_allocated() / 2**30 if place.device.type == "cuda" else None
    return {"images": batch / seconds, "ms": 1e3 * seconds, "GiB": used, "warm_up": warm_up}


COLUMNS = {
    "images/s": number("images", ",.0f"),
    "ms a step": number("ms"),
    "TFLOP/s": number("TFLOP/s"),
    "share of the vendor's peak": number("share", ".0%"),
    "peak GiB": number("GiB", ".1f"),
    "s until step 5": number("warm_up", ".0f"),
}


def rows(mode: str) -> dict:
    return {
        f"{mode}, {precision}, {batch}": partial(speed, mode=mode, precision=precision, batch=batch)
        for precision in PRECISIONS
        for batch in BATCHES
    }


TITLE = "Training Glow at the paper's size (3 scales of 32 steps, hidden=512) on images of CIFAR-10's size, "
COMPILING = Part(
    "compiling",
    "Seconds to compile and to take the first steps with a cold cache, while other checks run: the flows of `steps` "
    "below, then Glow at the paper's size with 512 images.",
    {
        **{name: partial(beside_others.compiling, name=name) for name in beside_others.NAMES},
        **{f"{one}, 512": partial(speed, mode="compiled", precision=one, batch=512) for one in PRECISIONS},
    },
    {"seconds": number("warm_up", ".0f"), "peak GiB": number("GiB", ".1f")},
    seconds=225,
    processes=2,
    rehearsed=("float32, 512",),
)
EAGER = Part("glow", TITLE + "layer by layer.", rows("eager"), COLUMNS, seconds=60)
COMPILED = Part(
    "glow compiled",
    TITLE + "with `compile=true`.",
    rows("compiled"),
    COLUMNS,
    seconds=100,
    rehearsed=("compiled, float32, 64",),
)
GRAPH = Part(
    "glow graph", TITLE + "as one CUDA graph.", {**rows("graph"), **rows("compiled, graph")}, COLUMNS, seconds=60
)
PEERS = Part(
    "glow beside others",
    "The same size in other libraries, as their users run it: float32 with TF32 convolutions; without the learned "
    "priors and the dequantization of ours.",
    {
        f"{name}, {batch}": partial(peer, name=name, batch=batch)
        for name in ("nflows", "normflows", "freia")
        for batch in BATCHES
    },
    {key: COLUMNS[key] for key in ("images/s", "ms a step", "peak GiB")},
    seconds=45,
)
