"""Suite ``epoch``: an epoch of a large table by our loader, against the usual loop around a peer's flow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import data
from flowtrain.benchmarks import ours
from flowtrain.benchmarks.session import OURS, Load, Row, Session, against_peers
from flowtrain.benchmarks.training_steps import step_on, vector_peers

ROWS, SMOKE_ROWS = 10_000_000, 1000
SIZES, SMOKE_SIZES = (6, 64, 4), (6, 8, 2)  # dimensions, width, couplings
BATCH, SMOKE_BATCH = 1024, 100
PEERS = ("nflows", "zuko")


def rows(session: Session) -> Iterator[Row]:
    count, batch, sizes = (SMOKE_ROWS, SMOKE_BATCH, SMOKE_SIZES) if session.smoke else (ROWS, BATCH, SIZES)
    table = torch.randn(count, sizes[0], generator=torch.Generator().manual_seed(session.seed))
    x = table[:batch].to(session.device)
    flow = ours.build_perturbed(partial(ours.nsf_coupling, *sizes), x, session.seed)
    peers = vector_peers(session, "nsf_coupling", flow, sizes, x)
    modules = {OURS: flow, **{name: peer for name, peer in peers.items() if name in PEERS}}
    begin, steps = {}, {}
    for name, module in modules.items():
        start = time.perf_counter()
        batches = _our_batches(session, table, batch) if name == OURS else _usual_batches(table, batch)
        next(batches)  # shuffles the rows
        begin[name] = time.perf_counter() - start
        on_device = (each.to(session.device) for each in batches)
        steps[name] = step_on(on_device, module.to(session.device), ours.optimizer)
    times = session.times(steps)
    epochs = {name: [begin[name] + count // batch * seconds for seconds in times[name]] for name in times}
    work = f"epoch of {count:,} × {sizes[0]}, batch {batch}, from some of its steps"
    yield from against_peers("epoch", work, epochs, Load(count, "rows"))


def _our_batches(session: Session, table: Tensor, batch: int) -> Iterator[Tensor]:
    loader = data.Loader(data.ArraySplit(table), batch, session.seed, device=session.device)
    return (each.x for each in loader.batches())


def _usual_batches(table: Tensor, batch: int) -> Iterator[Tensor]:
    loader = DataLoader(TensorDataset(table), batch, shuffle=True, drop_last=True)
    return (x for (x,) in chain.from_iterable(repeat(loader)))
