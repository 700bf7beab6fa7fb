"""Suite ``serve``: a million rows in one call and the latency of one row, against the peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from flowtrain.benchmarks import ours
from flowtrain.benchmarks.sampling import without_gradients
from flowtrain.benchmarks.session import OURS, Load, Row, Session, against_peers
from flowtrain.benchmarks.training_steps import vector_peers

SIZES, SMOKE_SIZES = (6, 64, 4), (4, 8, 2)  # dimensions, width, couplings
MANY, SMOKE_MANY = 1_000_000, 100
CALLS, SMOKE_CALLS = 300, 4  # of one row each
COUPLINGS, MANY_PEERS = "NSF coupling", ("nflows",)  # zuko's takes a minute for a million samples


def rows(session: Session) -> Iterator[Row]:
    sizes = SMOKE_SIZES if session.smoke else SIZES
    x = torch.randn(256, sizes[0]).to(session.device)
    flow = ours.build_perturbed(partial(ours.nsf_coupling, *sizes), x, session.seed)
    peers = vector_peers(session, "nsf_coupling", flow, sizes, x)
    yield from _many_rows(session, flow, {name: peer for name, peer in peers.items() if name in MANY_PEERS}, sizes[0])
    yield from _one_row(session, flow, peers, sizes[0])


def _many_rows(session: Session, flow: nn.Module, peers: dict[str, nn.Module], dimensions: int) -> Iterator[Row]:
    count = SMOKE_MANY if session.smoke else MANY
    x = torch.randn(count, dimensions).to(session.device)
    densities = {OURS: without_gradients(flow, lambda: flow.log_prob(x))}
    samples = {OURS: without_gradients(flow, lambda: flow.sample(count))}
    for name, peer in peers.items():
        densities[name] = without_gradients(peer, partial(peer, x))
        samples[name] = without_gradients(peer, lambda peer=peer: peer.decode(torch.randn_like(x)))
    for what, unit, variants in (("log_prob", "rows", densities), ("sample", "samples", samples)):
        work = f"{COUPLINGS}, D = {dimensions}: {what} of {count:,} rows in one call"
        yield from against_peers("serve", work, session.times(variants), Load(count, unit))


def _one_row(session: Session, flow: nn.Module, peers: dict[str, nn.Module], dimensions: int) -> Iterator[Row]:
    x = torch.randn(1, dimensions).to(session.device)
    variants: dict[str, Callable] = {OURS: without_gradients(flow, lambda: flow.log_prob(x))}
    variants |= {name: without_gradients(peer, partial(peer, x)) for name, peer in peers.items()}
    times = session.latencies(variants, SMOKE_CALLS if session.smoke else CALLS)
    work = f"{COUPLINGS}, D = {dimensions}: log_prob of one row"
    for percentile in (50, 99):
        found = {name: [_percentile(calls, percentile)] for name, calls in times.items()}
        yield from against_peers("serve", f"{work}, p{percentile}", found)


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
