"""Peak memory of a training step, and what less of it costs: Glow to bare convolutions and to a shallower one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.session import BARE, OURS, Row, Session, row
from flowtrain.benchmarks.training_steps import GLOW, IMAGES, SMOKE_GLOW, SMOKE_IMAGES, glow_peers, step
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.engine.peak import peak_bytes
from flowtrain.flow import Flow

TO_BARE, TO_SHALLOW, TIME, GRADIENT = 1.10, 1.3, 1.25, 1e-5
SHALLOW, DEEP, BATCH = 4, 32, 64  # steps of one level: 12 channels of 16×16, hidden 128
SAVING = ("checkpoint", "reversible")


def rows(session: Session) -> Iterator[Row]:
    yield from _to_bare(session)
    yield from _by_depth(session)


def _to_bare(session: Session) -> Iterator[Row]:
    sizes = SMOKE_GLOW if session.smoke else GLOW
    x = torch.randn(SMOKE_IMAGES if session.smoke else IMAGES, 3, sizes[0], sizes[0]).to(session.device)
    flow = ours.started(partial(ours.glow, *sizes), x, session.seed)
    modules = {OURS: flow, BARE: ours.bare_glow(*sizes), **glow_peers(session, sizes, x)}
    work = f"peak memory of a Glow training step, {sizes[0]}×{sizes[0]}"
    session.count(work, modules)
    make = ours.optimizer
    peaks = {name: _peak(step(module, make, x), session) for name, module in modules.items()}
    for name in peaks:
        if name != BARE:
            yield _of(work, peaks, name, BARE, TO_BARE if name == OURS else None)


def _by_depth(session: Session) -> Iterator[Row]:
    side, hidden, shallow, deep, batch = (8, 8, 1, 4, 4) if session.smoke else (32, 128, SHALLOW, DEEP, BATCH)
    x = torch.randn(batch, 3, side, side).to(session.device)
    make = ours.optimizer
    flows, steps, peaks = {}, {}, {}
    for count in (shallow, deep):
        plain = ours.started(partial(ours.glow, side, hidden, 1, count), x, session.seed)
        for memory in MEMORY_MODES:
            flow = copy.deepcopy(plain).train()
            flow.set_backpropagation(MEMORY_MODES[memory]())
            flows[memory], steps[memory] = flow, step(flow, make, x)
            peaks[_named(memory, count)] = _peak(steps[memory], session)
    work = f"peak memory of {deep} Glow steps to {shallow}"
    for memory in MEMORY_MODES:
        names = _named(memory, deep), _named(memory, shallow)
        yield _of(work, peaks, *names, TO_SHALLOW if memory in SAVING else None)

    times = session.times({_named(memory, deep): run for memory, run in steps.items()})
    for memory in SAVING:
        names = _named(memory, deep), _named("none", deep)
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


def _named(memory: str, count: int) -> str:
    return f"memory={memory}, {count} steps"


def _peak(run: Callable[[], None], session: Session) -> int:
    """In bytes, once the optimizer's state is there."""
    run()
    return peak_bytes(run, session.device)


def _of(work: str, peaks: dict[str, int], mine: str, theirs: str, target: float | None) -> Row:
    amounts = tuple(f"{peaks[name] / 2**20:.3g} MiB" for name in (mine, theirs))
    return Row("memory", work, mine, theirs, peaks[mine] / peaks[theirs], 0.0, target, amounts=amounts)


def _gradients(flow: Flow, weights: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the mean log-density under the same weights for all."""
    flow.load_state_dict(weights.state_dict())
    flow.zero_grad()
    flow(x).mean().backward()
    return [parameter.grad for parameter in flow.parameters()]
