"""Suite ``sample``: sampling from autoregressive flows against nflows, and from each family against its own density."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.session import OURS, Load, Row, Session, row
from flowtrain.benchmarks.training_steps import vector_peers

DENSITY = "one density pass"
# D -> targets of ours to nflows
MAF = {21: 1 / 18, 43: 1 / 28, 63: 1 / 40}
NSF = {21: 1 / 9, 43: 1 / 18, 63: 1 / 30}
PASSES = 2.5  # of an autoregressive spline flow's own density
GLOW_PASSES = 1.1
BATCH, IMAGES = 1000, 64


def rows(session: Session) -> Iterator[Row]:
    yield from _autoregressive_rows(session, "maf", "MAF", (512, 5), MAF, None)
    yield from _autoregressive_rows(session, "nsf_autoregressive", "NSF autoregressive", (256, 5), NSF, PASSES)
    yield from _glow_rows(session)


def _autoregressive_rows(session: Session, work: str, name: str, sizes, targets, passes: float | None) -> Iterator[Row]:
    """Time sampling at each D: against nflows at every D, against the other peers only at the smallest."""
    smallest = min(targets)
    for dimensions, target in targets.items():
        full = (3 + dimensions // 21, 8, 2) if session.smoke else (dimensions, *sizes)
        batch = 8 if session.smoke else BATCH
        what = f"{name} sampling, {batch} of D = {full[0]}"
        x = torch.randn(batch, full[0]).to(session.device)
        flow = ours.build_perturbed(partial(getattr(ours, work), *full), x, session.seed)
        peers = vector_peers(session, work, flow, full, x)
        compared = peers if dimensions == smallest else {name: peer for name, peer in peers.items() if name == "nflows"}
        session.count(what, {OURS: flow, **compared})
        variants = {
            OURS: without_gradients(flow, lambda flow=flow: flow.sample(batch)),
            DENSITY: without_gradients(flow, lambda flow=flow, x=x: flow(x)),
            **{
                name: without_gradients(peer, lambda peer=peer, x=x: peer.decode(torch.randn_like(x)))
                for name, peer in compared.items()
            },
        }
        times, load = session.times(variants), Load(batch, "samples")
        for peer in compared:
            yield row("sample", what, times, OURS, peer, target if peer == "nflows" else None, load)
        yield row("sample", what, times, OURS, DENSITY, passes, load)


def _glow_rows(session: Session) -> Iterator[Row]:
    sizes = (8, 8, 2, 1) if session.smoke else (32, 128, 3, 8)
    count = 4 if session.smoke else IMAGES
    x = torch.randint(0, 256, (count, 3, sizes[0], sizes[0]), dtype=torch.uint8).to(session.device)
    flow = ours.build_perturbed(partial(ours.whole_glow, *sizes), x, session.seed)
    what = f"Glow sampling, {count} images of {sizes[0]}×{sizes[0]}"
    session.count(what, {OURS: flow})
    with torch.no_grad():
        again = flow.eval().decode(flow.encode(x))
    session.check(f"{what}: images that come back changed", float((again != x).flatten(1).any(1).sum()), 0)
    times = session.times(
        {
            OURS: without_gradients(flow, lambda: flow.sample(count)),
            DENSITY: without_gradients(flow, lambda: flow(x)),
        }
    )
    yield row("sample", what, times, OURS, DENSITY, GLOW_PASSES, Load(count, "images"))


def without_gradients(module: nn.Module, run: Callable) -> Callable[[], None]:
    """A function that calls ``run`` without gradients, after switching ``module`` to evaluation mode."""
    module.eval()

    def inner() -> None:
        with torch.no_grad():
            run()

    return inner
