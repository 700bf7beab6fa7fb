"""Suite ``train``: training steps of our flows and the peers', against bare networks, all with the same optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.session import BARE, COMPILED, OURS, Load, Row, Session, ratios
from flowtrain.engine.compiling import compile_flow

# work -> (name, sizes, sizes of a smoke test, targets of ours to bare networks)
VECTORS = [
    ("maf", "MAF", (21, 512, 5), (4, 8, 2), {OURS: 0.95}),
    ("maf", "MAF", (43, 512, 5), (5, 8, 2), {OURS: 0.95}),
    ("nsf_coupling", "NSF coupling", (43, 256, 10), (5, 8, 2), {OURS: 1.25, COMPILED: 1.05}),
    ("nsf_autoregressive", "NSF autoregressive", (43, 256, 5), (5, 8, 2), {OURS: 1.30, COMPILED: 1.10}),
]
BATCH, SMOKE_BATCH = 512, 8
# flows of the size that most users train: the number of operations is the time, more than what they compute
SMALL = [
    ("maf", "small MAF", (3, 64, 5), (3, 8, 2), {OURS: None, COMPILED: 1.0}),
    ("nsf_coupling", "small NSF coupling", (3, 64, 4), (3, 8, 2), {OURS: 2.0, COMPILED: 1.0}),
    ("nsf_autoregressive", "small NSF autoregressive", (3, 64, 3), (3, 8, 2), {OURS: 2.0, COMPILED: 1.0}),
]
SMALL_BATCHES = 64, 256
GLOW, SMOKE_GLOW = (32, 128, 3, 8), (8, 8, 2, 1)  # side, hidden, scales, steps of flow
IMAGES, SMOKE_IMAGES = 16, 4
COLD = 15.0  # seconds that compiling may take
WHOLE = "flowtrain, the whole Glow"  # dequantization, learned priors, actnorms inside the networks
GLOW_TARGETS = {OURS: 1.10, COMPILED: 0.95, WHOLE: 1.20}


def rows(session: Session) -> Iterator[Row]:
    for work, name, full, tiny, targets in VECTORS:
        sizes = tiny if session.smoke else full
        x = torch.randn(SMOKE_BATCH if session.smoke else BATCH, sizes[0]).to(session.device)
        yield from _vector_rows(session, work, f"{name} training step, D = {sizes[0]}", sizes, x, targets)
    few = slice(1 if session.smoke else None)
    for batch in SMALL_BATCHES[few]:
        for work, name, full, tiny, targets in SMALL[few]:
            sizes = tiny if session.smoke else full
            x = torch.randn(batch, sizes[0]).to(session.device)
            title = f"{name} training step, D = {sizes[0]}, batch {batch}"
            yield from _vector_rows(session, work, title, sizes, x, targets)
    yield from _glow_rows(session)


def _vector_rows(session: Session, work: str, name: str, sizes, x: Tensor, targets) -> Iterator[Row]:
    flow = ours.build_perturbed(partial(getattr(ours, work), *sizes), x, session.seed)
    bare = getattr(ours, f"bare_{work}")(*sizes)
    modules = {OURS: flow, BARE: bare, **vector_peers(session, work, flow, sizes, x)}
    yield from _step_rows(session, name, modules, x, targets, Load(len(x), "rows"))


def vector_peers(session: Session, work: str, flow: nn.Module, sizes, x: Tensor) -> dict[str, nn.Module]:
    """Build the peers' flows like ``flow``, and check that these and ours are exact."""
    name = f"{work}, D = {sizes[0]}"
    nets = ours.networks(flow)
    session.check_flow(f"{name}, {OURS}", ours.AsPeer(flow), x[:8])
    found = {}
    for peer, build_peer in session.peers_with(work).items():
        found[peer] = module = build_peer(nets, *sizes).to(x.device)
        session.check_flow(f"{name}, {peer}", module, x[:8])
        if module.same:
            session.check_same(f"{name}, {peer}: our density with our weights", flow, module, x[:64])
        for mine, theirs in zip(nets, module.nets):
            session.check_same(f"{name}, {peer}: our network with our weights", mine, theirs, x[:64])
    return found


def _glow_rows(session: Session) -> Iterator[Row]:
    sizes = SMOKE_GLOW if session.smoke else GLOW
    x = torch.randn(SMOKE_IMAGES if session.smoke else IMAGES, 3, sizes[0], sizes[0]).to(session.device)
    flow = ours.build_perturbed(partial(ours.glow, *sizes), x, session.seed)
    modules = {OURS: flow, BARE: ours.bare_glow(*sizes), **glow_peers(session, sizes, x)}
    images = torch.randint(0, 256, x.shape, dtype=torch.uint8).to(x.device)
    whole = step(ours.build_perturbed(partial(ours.whole_glow, *sizes), images, session.seed), ours.optimizer, images)
    name = f"Glow training step, {sizes[0]}×{sizes[0]}"
    yield from _step_rows(session, name, modules, x, GLOW_TARGETS, Load(len(x), "images"), {WHOLE: whole})


def glow_peers(session: Session, sizes, x: Tensor) -> dict[str, nn.Module]:
    """Build the peers' Glows and initialize them from ``x``; check first that small ones, and ours, are exact."""
    small = (8, 8, 2, 2)  # side, hidden, scales, steps of flow
    few = torch.randn(8, 3, 8, 8).to(x.device)
    session.check_flow(
        f"glow, {OURS}", ours.AsPeer(ours.build_perturbed(partial(ours.glow, *small), few, session.seed)), few
    )
    found = {}
    for peer, build_peer in session.peers_with("glow").items():
        small_peer = build_peer(*small).to(x.device)
        small_peer(few)
        session.check_flow(f"glow, {peer}", small_peer, few)
        found[peer] = build_peer(*sizes).to(x.device)
        found[peer](x)
    return found


def _step_rows(
    session: Session, name: str, modules: dict[str, nn.Module], x: Tensor, targets, load: Load, more=None
) -> Iterator[Row]:
    """Time the training steps of ``modules`` and the steps ``more``, as multiples of the bare networks'."""
    session.count(name, modules)
    make = ours.optimizer
    variants = {variant: step(module, make, x) for variant, module in modules.items()} | (more or {})
    compile_rows = []
    if session.compiled and COMPILED in targets:
        variants[COMPILED], compile_rows = compiled_step(session, name, modules[OURS], make, x)
    times = session.times(variants)
    yield from ratios("train", name, times, BARE, targets, load)
    yield from compile_rows


def step(module: nn.Module, make: Callable, x: Tensor) -> Callable[[], None]:
    """A training step of ``module`` on ``x``, with its own optimizer."""
    return step_on(repeat(x), module.to(x.device), make)


def step_on(batches: Iterator[Tensor], module: nn.Module, make: Callable) -> Callable[[], None]:
    """A training step of ``module`` on the next of ``batches``, with its own optimizer."""
    module.train()
    optimizer = make(module.parameters())

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(next(batches)).mean().neg().backward()
        optimizer.step()

    return run


def compiled_step(
    session: Session, name: str, flow: nn.Module, make: Callable, x: Tensor
) -> tuple[Callable[[], None], list[Row]]:
    """A training step of a compiled copy of ``flow``, and rows of how long compiling took: with an empty
    cache, and again with what that left there. Checks that the copy gives the same densities."""
    from torch._inductor.utils import fresh_cache

    seconds = []
    with fresh_cache():
        for _ in range(2):
            torch.compiler.reset()  # torch counts the compilations of other flows too
            fast = copy.deepcopy(flow)
            compiled = compile_flow(fast)
            run = step(fast, make, x)
            density, eager = fast(x), flow.train()(x)
            error = ((density - eager).abs() / eager.abs().clamp(min=1)).max().item()
            session.check(f"{name}, compiled: our density", error, 1e-4)
            run()
            compiled.settle()
            seconds.append(compiled.seconds)
    what = f"{name}, compiling"
    return run, [
        Row("train", what, "for the first time", None, seconds[0], 0.0, COLD, unit="s"),
        Row("train", what, "with the code kept", None, seconds[1], 0.0, None, unit="s"),
    ]
