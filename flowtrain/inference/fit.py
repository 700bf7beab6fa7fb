"""``flowtrain.fit``: from rows in memory to a flow, by the command's own trainer."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from flowtrain.data import Columns
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.inference.choosing import AUTO, Candidate, choose
from flowtrain.inference.context import take_raw_contexts
from flowtrain.inference.given import given
from flowtrain.inference.training import train, training_config
from flowtrain.runtime import distributed
from flowtrain.runtime.borrowed import borrowed_torch, quiet


@dataclass(frozen=True)
class Fitted:
    """How a flow was fitted: its ``fitted``.

    Attributes:
        model: its name and what differs from the defaults.
        log_likelihood, log_likelihood_stderr: of the rows for validation, mean and standard error, in nats a row; of a
            mixture that ``model="auto"`` chose, before it was fitted to those rows too.
        training_rows, validation_rows: their numbers.
        steps, seconds: of training.
        history: one mapping for each report: "step", "seconds" where known, and the mean log-likelihood of "train" or
            "validation" in nats.
        columns: of a DataFrame: ``columns.encode(frame)`` is what the flow takes, (x, context), and
            ``columns.decode(samples)`` a mapping from names to values, for ``pandas.DataFrame``.
        candidates: of ``model="auto"``, in the order of their validation, the best first.
        why: of ``model="auto"``: why this one.
    """

    model: str
    log_likelihood: float
    log_likelihood_stderr: float | None
    training_rows: int
    validation_rows: int
    steps: int
    seconds: float
    history: tuple[dict[str, float], ...]
    columns: Columns | None = None
    candidates: tuple[Candidate, ...] = ()
    why: str = ""


def fit(
    x,
    context=None,
    model: str = "nsf_coupling",
    minutes: float | None = 1.0,
    *,
    columns: Sequence[str] | None = None,
    types: Mapping | None = None,
    missing: str = "refuse",
    val_size: float | int | None = None,
    options: Mapping | None = None,
    seed: int = 1,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Flow:
    """Fit a flow to the rows of ``x``: the density of x, or of x given ``context``, in the units of x.

    This is ``flowtrain train`` in Python: its models, trainer and defaults. Some rows are set apart for validation;
    training ends when they become less likely, at the latest after ``minutes``, and the weights of the best validation
    are kept. No file is written, signals and torch's state stay yours, and it works in notebooks and threads. Threads
    that fit at once take turns, step by step, since torch has one generator: their numbers are those of one after the
    other.

    Args:
        x: rows (N, D), an array, a tensor or nested lists, all columns real numbers; or a pandas DataFrame, whose
            columns are understood as those of a file of ``dataset=table``: categories, whole numbers, times.
        context: what each row is conditional on, numbers (N, C), which the flow standardizes; for a DataFrame, names
            of its columns.
        model: the name of a model of rows, as ``flowtrain train model=…`` takes it; or "auto": chosen by validation
            among families, depths and widths, Gaussian mixtures and kernel densities, within the same minutes.
        minutes: until it returns, validation included; None: no limit but that of ``options``.
        columns, types, missing: of a DataFrame: the columns to model, their types, and what to do with missing values
            ("refuse", "drop" or "model"), as ``dataset.columns``, ``dataset.types`` and ``dataset.missing``.
        val_size: number or fraction of the rows for validation; None: a tenth, but up to a quarter of a short table
            and of a long one at most 20,000.
        options: keys of the command, such as ``{"model.steps": 5, "optimizer.lr": 1e-3, "base": "mixture"}``.
        seed: of the split, the start and the order of the rows.
        device: where to train; None: a GPU where there is one. The flow stays there.
        progress: show a bar on a terminal and in a notebook, and log lines elsewhere; False: nothing at all.

    Returns:
        A :class:`flowtrain.Flow` in evaluation mode, of float32 weights: ``log_prob`` and ``sample`` in the units of
        ``x``. float64 rows are read and rounded; after ``flow.double()`` it computes in float64. ``flow.fitted`` is a
        :class:`Fitted`: the validation figure, the history, and the columns of a DataFrame.

    Raises:
        ValueError: in one line, what is wrong with the rows or an argument.
        RuntimeError: training failed, for example because its loss was not finite.

    >>> import numpy as np, flowtrain
    >>> x = np.random.default_rng(0).normal(size=(200, 2)) @ [[1.0, 0.8], [0.0, 0.6]]
    >>> flow = flowtrain.fit(x, minutes=0.02, progress=False)
    >>> flow.log_prob(torch.tensor(x)).shape, flow.sample(5).shape, flow.fitted.validation_rows
    (torch.Size([200]), torch.Size([5, 2]), 50)
    """
    began = time.monotonic()
    options = dict(options or {})
    _check(minutes, options, seed)
    seed = int(seed)
    deadline = math.inf if minutes is None else began + 60 * minutes
    device = _device(device)
    with borrowed_torch(), nullcontext() if progress else quiet(), _plain_errors():
        data = given(x, context, columns=columns, types=types, missing=missing, val_size=val_size, seed=seed)
        if model == AUTO:
            found = choose(data, options, seed, device, deadline, progress)
            trained, name, candidates, why = found.trained, found.name, found.candidates, found.why
        else:
            config = training_config(model, options, len(data.train), seed)
            trained = train(config, data, device, deadline, progress)
            name, candidates, why = model, (), ""
        flow = trained.flow
        if data.moments is not None:
            take_raw_contexts(flow, data.moments)
    flow.fitted = Fitted(
        model=name,
        log_likelihood=trained.evaluation.log_likelihood,
        log_likelihood_stderr=trained.evaluation.log_likelihood_stderr,
        training_rows=len(data.train),
        validation_rows=len(data.val),
        steps=trained.steps,
        seconds=time.monotonic() - began,
        history=trained.history,
        columns=data.columns,
        candidates=candidates,
        why=why,
    )
    return flow


def _check(minutes, options: dict, seed) -> None:
    if distributed.world() > 1:
        raise ValueError("fit trains in one process; flowtrain train takes several")
    if minutes is None and not {"max_steps", "trainer.max_epochs"} & options.keys():
        raise ValueError("minutes=None: then options must say the end: max_steps or trainer.max_epochs")
    if minutes is not None and not (isinstance(minutes, Real) and 0 < minutes < math.inf):
        raise ValueError(f"minutes={minutes}: must be a number above 0, or None")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed={seed}: must be a whole number of at least 0")


def _device(device) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device}: {str(error).splitlines()[0]}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch sees no GPU here")
    return found


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise errors of the command as ValueError, or RuntimeError where nothing was wrong with the arguments."""
    try:
        yield
    except FlowtrainError as error:
        kind = ValueError if isinstance(error, UsageError) else RuntimeError
        raise kind(re.sub(r"\bdataset\.(?=columns|types|missing|context|val_size)", "", str(error))) from error
