"""Simulations in worker processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowtrain.data.simulations.store import Block, Store
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import seeds
from flowtrain.runtime.interrupts import interruptible

log = logging.getLogger("flowtrain")

PRIOR_BLOCK = 1024  # parameters that are drawn with one seed
SECONDS = 2.0  # after which a worker hands back what it has, so that little is lost
NOT_FINITE = "it returned NaN or an infinite number"
LARGEST = 1000  # rows of a task, and of a call of a simulator that takes many


def draw_parameters(prior: Any, first: int, stop: int, seed: int) -> Tensor:
    """Parameters of rows ``first`` to ``stop``, float32: a function of the seed and of each row's number."""
    parts = []
    with torch.random.fork_rng(devices=[]):
        for start in range(first // PRIOR_BLOCK * PRIOR_BLOCK, stop, PRIOR_BLOCK):
            torch.manual_seed(seeds.seed_from(seed, 0, start))
            parts.append(prior.sample((PRIOR_BLOCK,)))
    offset = first // PRIOR_BLOCK * PRIOR_BLOCK
    return torch.cat(parts)[first - offset : stop - offset]


def simulate_into(
    store: Store, rows: int, width: int, prior: Any, simulate: Callable, seed: int, batched: bool, workers: int
) -> None:
    """Simulate what ``store`` lacks of the first ``rows`` rows, ``width`` numbers each, and keep it there, block by
    block.

    Raises:
        FlowtrainError: a worker process ended early.
        Interrupted: a signal; the finished blocks are kept.
    """
    tasks = []
    for first, stop in store.missing(rows):
        size = LARGEST if batched else max(1, min(LARGEST, -(-(stop - first) // (4 * workers))))
        first = first // size * size if batched else first
        tasks += [(start, start + size if batched else min(start + size, stop)) for start in range(first, stop, size)]
    tasks.reverse()
    context = multiprocessing.get_context("fork")
    bar = tqdm(total=sum(stop - first for first, stop in tasks), unit="simulation", unit_scale=True, disable=None)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (simulate, os.getpid()))
    running: dict[Future, tuple[int, int]] = {}
    try:
        with bar:
            while tasks or running:
                while tasks and len(running) < 2 * workers:
                    first, stop = tasks.pop()
                    theta = draw_parameters(prior, first, stop, seed)
                    running[pool.submit(_run_batch if batched else _run_rows, theta, first, seed, width)] = first, stop
                with interruptible():
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    (first, stop), block = running.pop(future), future.result()
                    store.write(block)
                    bar.update(block.stop - block.first)
                    if block.stop < stop:  # the worker's time was up
                        tasks.append((block.stop, stop))
    except BrokenProcessPool as error:
        raise FlowtrainError(
            "dataset.simulate: a worker process ended early, as one does that needs more memory than there is; the"
            f" simulations so far are kept in {store.folder}"
        ) from error
    finally:
        for process in [*(pool._processes or {}).values()]:
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


_simulate: Callable  # of a worker process


def _start_worker(simulate: Callable, parent: int) -> None:
    global _simulate
    _simulate = simulate
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _follow(parent: int) -> None:
    """End this process when its parent has ended, which a kill leaves no time to end it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def seed_everything(*numbers: int) -> None:
    """Seed the random numbers of torch, numpy and Python."""
    seed = seeds.seed_from(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Give the random numbers of torch, numpy and Python back the state that they had before this block."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _run_rows(theta: Tensor, first: int, seed: int, width: int) -> Block:
    """Simulate rows one by one until all are done, or the time is up. Each row has a seed of its own."""
    x, reason, end = np.full((len(theta), width), np.nan, np.float32), "", time.monotonic() + SECONDS
    for place, row in enumerate(theta):
        seed_everything(seed, 1, first + place)
        found, why = simulate_row(_simulate, row)
        if found is not None and len(found) == width:
            x[place] = found
        else:
            reason = reason or why or _other_width(len(found), width)
        if time.monotonic() > end:
            break
    return Block(first, theta[: place + 1].numpy(), x[: place + 1], reason)


def simulate_row(simulate: Callable, theta: Tensor) -> tuple[np.ndarray | None, str]:
    """x of one parameter (D,), float32 (C,), or None and why there is none."""
    try:
        x = _to_array(simulate(theta)).reshape(-1)
    except Exception as error:  # whatever a simulator raises
        return None, f"{type(error).__name__}: {error}"
    return (x, "") if np.isfinite(x).all() else (None, NOT_FINITE)


def _run_batch(theta: Tensor, first: int, seed: int, width: int) -> Block:
    """Simulate rows together, with one seed."""
    seed_everything(seed, 2, first)
    x = np.full((len(theta), width), np.nan, np.float32)
    try:
        found = _to_array(_simulate(theta))
    except Exception as error:
        return Block(first, theta.numpy(), x, f"{type(error).__name__}: {error}")
    if found.ndim == 0 or len(found) != len(theta):
        how = f"it returned shape {list(found.shape)} for {len(theta)} parameters (batched=true)"
        return Block(first, theta.numpy(), x, how)
    found = found.reshape(len(found), -1)
    if found.shape[1] != width:
        return Block(first, theta.numpy(), x, _other_width(found.shape[1], width))
    good = np.isfinite(found).all(1)
    x[good] = found[good]
    return Block(first, theta.numpy(), x, "" if good.all() else NOT_FINITE)


def _other_width(found: int, width: int) -> str:
    return f"it returned {found} numbers, not {width}"


def _to_array(x: Any) -> np.ndarray:
    """What a simulator returns, as a float32 array of its own."""
    x = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    with np.errstate(over="ignore"):
        return np.array(x, dtype=np.float32)
