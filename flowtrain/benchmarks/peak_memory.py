"""Suite ``memory``: the peak memory of a Glow training step and the time that saving memory costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.session import BARE, OURS, Row, Session, best_peer, row
from flowtrain.benchmarks.training_steps import GLOW, IMAGES, SMOKE_GLOW, SMOKE_IMAGES, glow_peers, step
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.engine.peak import peak_bytes
from flowtrain.flow import Flow

TO_BARE, TO_SHALLOW, TIME, GRADIENT = 1.05, 1.2, 1.25, 1e-5
SHALLOW, DEEP, BATCH = 4, 32, 64  # steps of flow at one scale: 12 channels of 16×16, hidden 128
SAVING = ("checkpoint", "reversible")


def rows(session: Session) -> Iterator[Row]:
    yield from _compare_to_bare(session)
    yield from _compare_depths(session)


def _compare_to_bare(session: Session) -> Iterator[Row]:
    sizes = SMOKE_GLOW if session.smoke else GLOW
    x = torch.randn(SMOKE_IMAGES if session.smoke else IMAGES, 3, sizes[0], sizes[0]).to(session.device)
    flow = ours.build_perturbed(partial(ours.glow, *sizes), x, session.seed)
    modules = {OURS: flow, BARE: ours.bare_glow(*sizes), **glow_peers(session, sizes, x)}
    work = f"peak memory of a Glow training step, {sizes[0]}×{sizes[0]}"
    session.count(work, modules)
    make = ours.optimizer
    peaks = {name: _peak(step(module, make, x), session) for name, module in modules.items()}
    for name in peaks:
        if name != BARE:
            yield _peak_row(work, peaks, name, BARE, TO_BARE if name == OURS else None)


def _compare_depths(session: Session) -> Iterator[Row]:
    side, hidden, shallow, deep, batch = (8, 8, 1, 4, 4) if session.smoke else (32, 128, SHALLOW, DEEP, BATCH)
    x = torch.randn(batch, 3, side, side).to(session.device)
    make = ours.optimizer
    flows, steps, peaks = {}, {}, {}
    for count in (shallow, deep):
        plain = ours.build_perturbed(partial(ours.glow, side, hidden, 1, count), x, session.seed)
        for memory in MEMORY_MODES:
            flow = copy.deepcopy(plain).train()
            flow.set_backpropagation(MEMORY_MODES[memory]())
            flows[memory], steps[memory] = flow, step(flow, make, x)
            peaks[_variant(memory, count)] = _peak(steps[memory], session)
    work = f"peak memory of {deep} Glow steps to {shallow}"
    for memory in MEMORY_MODES:
        names = _variant(memory, deep), _variant(memory, shallow)
        yield _peak_row(work, peaks, *names, TO_SHALLOW if memory in SAVING else None)

    times = session.times({_variant(memory, deep): run for memory, run in steps.items()})
    for memory in SAVING:
        names = _variant(memory, deep), _variant("none", deep)
        yield row("memory", f"training step of {deep} Glow steps", times, *names, TIME)
    gradients = {memory: _gradients(flow, plain, x) for memory, flow in flows.items()}
    for memory in SAVING:
        error = max(
            ((mine - true).norm() / true.norm()).item()
            for mine, true in zip(gradients[memory], gradients["none"], strict=True)
            if true.norm() > 0
        )
        work = f"gradient of {deep} Glow steps, worst tensor's relative error"
        yield Row("memory", work, f"memory={memory}", "memory=none", error, 0.0, GRADIENT, unit="")


def _variant(memory: str, count: int) -> str:
    return f"memory={memory}, {count} steps"


def _peak(run: Callable[[], None], session: Session) -> int:
    """The peak memory of a training step in bytes, after a first step has created the optimizer's state."""
    run()
    return peak_bytes(run, session.device)


def _peak_row(work: str, peaks: dict[str, int], mine: str, theirs: str, target: float | None) -> Row:
    amounts = tuple(f"{peaks[name] / 2**20:.3g} MiB" for name in (mine, theirs))
    beside = best_peer({name: [peak] for name, peak in peaks.items()}, mine, of="memory")
    return Row("memory", work, mine, theirs, peaks[mine] / peaks[theirs], 0.0, target, amounts=amounts, beside=beside)


def _gradients(flow: Flow, weights: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of the mean log-density, with the state of ``weights``."""
    flow.load_state_dict(weights.state_dict())
    flow.zero_grad()
    flow(x).mean().backward()
    return [parameter.grad for parameter in flow.parameters()]
