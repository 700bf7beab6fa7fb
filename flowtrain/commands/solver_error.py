"""The parts of the error of an evaluation, the one that a solver of differential equations leaves among them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from flowtrain.bijections.ode import accuracy
from flowtrain.engine.evaluate import Evaluation
from flowtrain.flow import to_bits_per_dim

log = logging.getLogger("flowtrain")

LEAST = 1e-6  # tolerance: float32 has no use for a smaller one


@dataclass(frozen=True)
class Solve:
    """An evaluation at a ``tolerance``; ``moved``: how far it is from the one before, None for the first."""

    tolerance: float
    log_likelihood: float
    moved: float | None


@dataclass(frozen=True)
class Errors:
    """The parts of a standard error, in nats: of the choice of the rows, of the noises of a stochastic trace (0 for an
    exact one), and of the solver (None without an ODE).

    Attributes:
        trace_variance: of the log-density of a row with one noise, in nats²; the mean over rows.
        solves: the evaluations, at one tolerance after the other.
    """

    rows: float | None
    probes: float
    solver: float | None
    trace_variance: float
    solves: list[Solve]

    @classmethod
    def of(cls, found: Evaluation, solver: float | None = None, solves: Sequence[Solve] = ()) -> Errors:
        """Of an evaluation whose standard error holds that of the rows and of the noises."""
        probes, stderr = found.probes_stderr, found.log_likelihood_stderr
        rows = None if stderr is None else math.sqrt(max(0.0, stderr**2 - probes**2))
        return cls(rows, probes, solver, found.trace_variance, [*solves])

    def to_record(self) -> dict:
        return asdict(self)


def evaluate_to_its_error(
    evaluate: Callable[[], Evaluation], tolerance: float, dimensions: int
) -> tuple[Evaluation, Errors]:
    """An evaluation whose standard errors include the solver's error, and their parts.

    The tolerance of adaptive solvers is halved, and the steps of fixed ones doubled, until the mean moves less than its
    standard error. A local error in proportion to the tolerance leaves about as much as the last step has moved it.
    """
    solves: list[Solve] = []
    factor, moved = 1, math.inf
    while True:
        with accuracy(tolerance, factor):
            found = evaluate()
        if solves:
            moved = abs(found.log_likelihood - solves[-1].log_likelihood)
        solves.append(Solve(tolerance, found.log_likelihood, moved if solves else None))
        if moved <= (found.log_likelihood_stderr or 0.0):
            break
        if solves[1:] and tolerance / 2 < LEAST:
            log.warning("the solver's tolerance is %.1g, and the figure still moves by %.3g nats", tolerance, moved)
            break
        tolerance, factor = tolerance / 2, 2 * factor
    stderr, errors = found.log_likelihood_stderr, Errors.of(found, moved, solves)
    total = None if stderr is None else math.hypot(stderr, moved)
    in_bits = None if total is None else -to_bits_per_dim(total, dimensions)
    return replace(found, log_likelihood_stderr=total, bits_per_dim_stderr=in_bits), errors
