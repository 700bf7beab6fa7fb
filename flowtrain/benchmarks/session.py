"""What the suites of a benchmark share: settings, peers, exactness checks, timing, and the record of results."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from flowtrain.benchmarks.peers import PACKAGES
from flowtrain.benchmarks.timing import Spread, Times, ratio, time_in_turns
from flowtrain.engine.jacobian import log_abs_det
from flowtrain.errors import FlowtrainError

TOLERANCE = 1e-5  # in float64; some constants of peers are float32
OURS, COMPILED, BARE = "flowtrain", "flowtrain, compiled", "bare nets"


@dataclass(frozen=True)
class Beside:
    """What a variant of ours costs, as a multiple of what the best peer costs: ``of`` is time or memory."""

    peer: str
    ratio: float
    spread: float
    of: str = "time"


@dataclass(frozen=True)
class Row:
    """A result: what ``ours`` costs, as a multiple of what ``theirs`` costs, or in ``unit``."""

    suite: str
    work: str
    ours: str
    theirs: str | None
    value: float
    spread: float
    target: float | None  # at most; None: for comparison only
    unit: str = "×"
    amounts: tuple[str, ...] = ()  # what ours and theirs cost, as text
    rate: str = ""  # what ours does in a second, as text
    beside: Beside | None = None  # the best peer in the same comparison

    @property
    def reached(self) -> bool | None:
        return None if self.target is None else self.value - self.spread <= self.target


@dataclass
class Session:
    seed: int
    rounds: int
    seconds: float
    compiled: bool
    smoke: bool
    device: torch.device
    peers: dict[str, ModuleType]
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)
    exactness: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.order = random.Random(self.seed)

    def peers_with(self, work: str) -> dict[str, Callable]:
        """The function ``work`` of each peer that has one, by the peer's name."""
        return {name: getattr(peer, work) for name, peer in self.peers.items() if hasattr(peer, work)}

    # -- exactness

    def check(self, what: str, error: float, tolerance: float) -> None:
        """Record the error of a check.

        Raises:
            FlowtrainError: the error exceeds the tolerance, so that a measured time would mean nothing.
        """
        self.exactness.append({"what": what, "error": error, "tolerance": tolerance})
        if not error <= tolerance:
            raise FlowtrainError(f"bench: {what} is off by {error:.3g}, more than {tolerance:g}: nothing is timed")

    @torch.no_grad()
    def check_flow(self, name: str, flow: nn.Module, x: Tensor) -> None:
        """Check in float64 that ``decode`` inverts ``encode``, and the first log-determinant against the Jacobian.

        Raises:
            FlowtrainError: the flow is not exact.
        """
        flow = copy.deepcopy(flow).eval().double()
        x = x.double()
        z, log_det = flow.encode(x)
        self.check(f"{name}: round trip", _distance(flow.decode(z), x), TOLERANCE)
        jacobian = log_abs_det(lambda x, _: flow.encode(x), x[:1])
        self.check(f"{name}: log-determinant", _distance(jacobian, log_det[:1]), TOLERANCE)

    @torch.no_grad()
    def check_same(self, what: str, ours: Callable, theirs: Callable, x: Tensor) -> None:
        """Check that two modules agree on ``x`` in float64.

        Raises:
            FlowtrainError: they do not.
        """
        ours, theirs = (copy.deepcopy(module).eval().double() for module in (ours, theirs))
        self.check(what, _distance(ours(x.double()).flatten(), theirs(x.double()).flatten()), TOLERANCE)

    # -- sizes

    def count(self, work: str, modules: dict[str, nn.Module]) -> None:
        """Print and record how many trainable parameters each module has."""
        counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in modules.items()}
        self.parameters[work] = counts
        self.say(f"{work}: parameters " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))

    def say(self, text: str) -> None:
        """Print a line of progress to stderr."""
        print(text, file=sys.stderr, flush=True)

    # -- time

    def times(self, variants: dict[str, Callable[[], object]], slice: float = 0.1) -> Times:
        """Time the variants in turns: seconds a call, one number a round."""
        return time_in_turns(
            variants, self.rounds, self.seconds, self.order, self.synchronize, 1e-9 if self.smoke else slice
        )

    def latencies(self, variants: dict[str, Callable[[], object]], calls: int) -> Times:
        """The seconds of single calls of the variants, in turns."""
        return time_in_turns(variants, calls, self.seconds, self.order, self.synchronize, 1e-9)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Load:
    """What a timed call works on, such as 512 rows."""

    count: int
    unit: str


def ratios(
    suite: str, work: str, times: Times, theirs: str, targets: Mapping[str, float | None], load: Load | None = None
) -> Iterator[Row]:
    """A row for each variant against ``theirs``, rows with targets first."""
    for name in [*targets, *(name for name in times if name not in targets)]:
        if name in times and name != theirs:
            yield row(suite, work, times, name, theirs, targets.get(name), load)


def row(
    suite: str, work: str, times: Times, ours: str, theirs: str, target: float | None, load: Load | None = None
) -> Row:
    """A row with the ratio of two variants' times."""
    found = ratio(times, ours, theirs)
    amounts = tuple(clock(Spread.of(times[name]).median) for name in (ours, theirs))
    rate = "" if load is None else per_second(load, Spread.of(times[ours]).median)
    beside = best_peer(times, ours)
    return Row(
        suite, work, ours, theirs, found.median, found.half_range, target, amounts=amounts, rate=rate, beside=beside
    )


def against_peers(suite: str, work: str, times: Times, load: Load | None = None) -> Iterator[Row]:
    """A row of our flow against each peer, which it should not be slower than; without peers one with its seconds."""
    peers = [name for name in times if name in PACKAGES]
    for peer in peers:
        yield row(suite, work, times, OURS, peer, 1.0, load)
    if not peers:
        found = Spread.of(times[OURS])
        rate = "" if load is None else per_second(load, found.median)
        yield Row(suite, work, OURS, None, found.median, found.half_range, None, unit="s", rate=rate)


def best_peer(costs: Times, ours: str, of: str = "time") -> Beside | None:
    """The peer that costs the least, beside ``ours``; None if that is not a flow of ours, or there is no peer."""
    peers = [name for name in costs if name in PACKAGES]
    if not peers or not ours.startswith(OURS):
        return None
    peer = min(peers, key=lambda name: Spread.of(costs[name]).median)
    found = ratio(costs, ours, peer)
    return Beside(peer, found.median, found.half_range, of)


def per_second(load: Load, seconds: float) -> str:
    """A rate with three significant digits."""
    return f"{float(f'{load.count / seconds:.3g}'):,.0f} {load.unit}/s"


def clock(seconds: float) -> str:
    """A time with three significant digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
