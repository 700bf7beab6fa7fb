"""Training steps, sampling and splines of flowtrain beside nflows, zuko, normflows and FrEIA."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from flowtrain.benchmarks import ours, peers, splines
from flowtrain.benchmarks.sampling import without_gradients
from flowtrain.benchmarks.session import COMPILED, OURS, Session
from flowtrain.benchmarks.timing import Spread, Times
from flowtrain.benchmarks.training_steps import compiled_step, glow_peers, step, vector_peers
from on_gpu.part import Part, Place

PEERS = list(peers.PACKAGES)
FLOWS = {  # name -> work, hidden units, layers
    "MAF": ("maf", 512, 5),
    "NSF coupling": ("nsf_coupling", 256, 10),
    "NSF autoregressive": ("nsf_autoregressive", 256, 5),
}
DIMENSIONS, ROWS = 63, 1000
GLOW, SMALL_GLOW = (32, 128, 3, 8), (8, 8, 2, 1)  # side, hidden, scales, steps of flow
IMAGES = 64


class Recorder(Session):
    """A session of one row; ``measured`` holds its times."""

    def times(self, variants: dict, slice: float = 0.1) -> Times:
        self.measured = super().times(variants, slice)
        return self.measured


def session(place: Place, present: dict[str, ModuleType]) -> Recorder:
    compiled = not place.tiny  # a CPU's compiler takes longer than the rehearsal
    return Recorder(1, 15, 0.0 if place.tiny else 2.0, compiled, place.tiny, place.device, present)


def installed() -> dict[str, ModuleType]:
    return peers.import_installed(PEERS)[0]


def figures(times: Times, failed: dict[str, str]) -> dict:
    """Milliseconds of each variant, and why others have none."""
    return {"ms": {name: 1e3 * Spread.of(values).median for name, values in times.items()}, "without": failed}


def each_peer(place: Place, build: Callable[[Session], dict[str, nn.Module]]) -> tuple[dict, dict[str, str]]:
    """What ``build`` returns for every installed library, and why it fails for others."""
    built, failed = {}, {}
    for name, module in installed().items():
        try:
            built |= build(session(place, {name: module}))
        except Exception as error:  # of other people's code, on a device that they may not know
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    return built, failed


def ours_and_data(place: Place, name: str) -> tuple[nn.Module, Tensor, str, tuple[int, ...]]:
    """Our flow, data for it, the work that it does and its sizes."""
    if name == "Glow":
        work, sizes, batch = "glow", SMALL_GLOW if place.tiny else GLOW, 4 if place.tiny else IMAGES
        x = torch.randn(batch, 3, sizes[0], sizes[0])
    else:
        work, hidden, layers = FLOWS[name]
        sizes, batch = (5, 8, 2) if place.tiny else (DIMENSIONS, hidden, layers), 8 if place.tiny else ROWS
        x = torch.randn(batch, sizes[0])
    x = x.to(place.device)
    return ours.build_perturbed(partial(getattr(ours, work), *sizes), x, 1), x, work, sizes


def all_flows(place: Place, name: str) -> tuple[dict[str, nn.Module], dict[str, str], Tensor]:
    """Our flow and the others', why some are missing, and data."""
    flow, x, work, sizes = ours_and_data(place, name)
    build = partial(vector_peers, work=work, flow=flow) if name in FLOWS else glow_peers
    others, failed = each_peer(place, lambda one: build(one, sizes=sizes, x=x))
    return {OURS: flow, **others}, failed, x


def training(place: Place, name: str) -> dict:
    """Time a training step, with fused Adam for all."""
    flows, failed, x = all_flows(place, name)
    mine = session(place, {})
    variants = {key: step(module, ours.optimizer, x) for key, module in flows.items()}
    if mine.compiled:
        variants[COMPILED] = compiled_step(mine, name, flows[OURS], ours.optimizer, x)
    return figures(mine.times(variants), failed)


def compiling(place: Place, name: str) -> dict:
    """Compile a training step and take it."""
    flow, x, _, _ = ours_and_data(place, name)
    start = time.perf_counter()
    compiled_step(session(place, {}), name, flow, ours.optimizer, x)
    return {"warm_up": time.perf_counter() - start}


def sampling(place: Place, name: str) -> dict:
    """Time the inverse, without gradients."""
    flows, failed, x = all_flows(place, name)
    variants = {OURS: without_gradients(flows[OURS], lambda: flows[OURS].sample(len(x)))}
    for key, module in flows.items():
        if key != OURS:
            with torch.no_grad():
                z, _ = module.encode(x)
            variants[key] = without_gradients(module, lambda module=module, z=z: module.decode(z))
    return figures(session(place, {}).times(variants), failed)


def spline(place: Place) -> dict:
    """Time the spline alone, forward and backward."""
    mine = session(place, {name: module for name, module in installed().items() if hasattr(module, "spline")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(splines.rows(mine))
    return figures(mine.measured, {})


def cell(variant: str) -> Callable[[dict], str]:
    """A column: a variant's milliseconds, the least of a row in bold."""

    def text(row: dict) -> str:
        if variant not in row["ms"]:
            return "fails" if variant in row["without"] else "–"
        value = row["ms"][variant]
        return f"**{value:.3g}**" if value == min(row["ms"].values()) else f"{value:.3g}"

    return text


COLUMNS = {name: cell(name) for name in (OURS, COMPILED, *PEERS)}
NAMES = [*FLOWS, "Glow"]
STEPS = Part(
    "steps",
    f"Milliseconds of a training step: {ROWS} rows of D = {DIMENSIONS}, or {IMAGES} images of 32×32 (Glow, 3 scales of "
    "8 steps, hidden=128); flows of equal size, checked to be exact.",
    {f"{name}, training step": partial(training, name=name) for name in NAMES},
    COLUMNS,
    seconds=60,
)
SAMPLING = Part(
    "sampling",
    "Milliseconds to draw samples, as many as above.",
    {f"{name}, sampling": partial(sampling, name=name) for name in NAMES},
    COLUMNS,
    seconds=40,
)
SPLINES = Part(
    "splines",
    "Milliseconds of the rational-quadratic spline alone, forward and backward, of a million numbers.",
    {"spline": spline},
    COLUMNS,
    seconds=25,
)
