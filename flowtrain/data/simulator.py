"""Simulations of a user's own simulator: parameters, to be modelled given what was simulated with them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from flowtrain.data.download import on_first_rank
from flowtrain.data.simulations.prior import HOW, Made, Product, make_prior
from flowtrain.data.simulations.store import Store, gather
from flowtrain.data.simulations.workers import (
    draw_parameters,
    same_random_state,
    seed_everything,
    simulate_into,
    simulate_row,
)
from flowtrain.data.spec import ColumnContext, DataSpec
from flowtrain.data.split import ArraySplit, split_indices
from flowtrain.data.tables.column import Column
from flowtrain.data.tables.columns import Columns, moments
from flowtrain.data.vectors import Vectors
from flowtrain.errors import FlowtrainError, UsageError

log = logging.getLogger("flowtrain")

TRIES = 100  # simulations, to find out how many numbers one has
Find = Callable[[str, str], Callable]


class Simulator(Vectors):
    """Pairs of parameters θ of a prior and a simulation x with each: θ is modelled, and x is its context.

    So the flow is the posterior p(θ | x), inside the bounds of the prior. Rows and their random numbers are a function
    of ``split_seed``, for any number of workers. Simulations are kept under ``root/simulations``, in a folder that
    depends on the source of the modules of the two functions, on the prior and on the seed: more rows need only those
    that are missing. Runs at the same time share them: one simulates, the others wait for it.

    Args:
        prior: a mapping from the names of the parameters to ``[low, high]`` (uniform) or ``{mean: …, std: …}``
            (normal), or ``module:function``, a function that makes a ``torch.distributions.Distribution``.
        simulate: ``module:function``, a function of θ, a float32 tensor (D,), that returns the numbers x.
        batched: the function takes many θ (n, D) and returns as many x (n, …).
        names: of the parameters; None: those of ``prior``, else theta0, theta1, ….
        observed: names of the numbers of x; None: x0, x1, ….
        rows: number of simulations. Those that raise an exception or return NaN are left out and counted.
        workers: number of processes that simulate; None: as many as there are cores.
    """

    native_name = "simulator"
    uses_path = False

    def __init__(
        self,
        *,
        prior: Mapping | str | None = None,
        simulate: str | None = None,
        batched: bool = False,
        names: list | None = None,
        observed: list | None = None,
        rows: int = 10_000,
        workers: int | None = None,
        **keys,
    ):
        super().__init__(**keys)
        for key, value in (("simulate", simulate), ("prior", prior if isinstance(prior, str) else None)):
            if value is not None and (not isinstance(value, str) or not all(value.partition(":"))):
                self._refuse(key, value, "must be module:function")
        if prior is not None and not isinstance(prior, Mapping | str):
            self._refuse("prior", prior, f"must be {HOW}")
        self._check_type("batched", batched, bool, "true or false")
        for key, value in (("names", names), ("observed", observed)):
            if value is not None and (not isinstance(value, list | tuple) or len({*map(str, value)}) < len(value)):
                self._refuse(key, value, "must be a list of different names")
        self.rows = self._check_count("rows", rows, least=10)
        self.workers = len(os.sched_getaffinity(0)) if workers is None else self._check_count("workers", workers)
        self.prior, self.simulate, self.batched = prior, simulate, batched
        self.names = None if names is None else tuple(map(str, names))
        self.observed = None if observed is None else tuple(map(str, observed))
        self._find: Find | None = None
        self._known: Columns | None = None
        self._parts: dict[str, ArraySplit] = {}

    def use_functions(self, find: Find) -> None:
        self._find = find

    def use_columns(self, columns: Columns) -> None:
        self._known = columns

    @property
    def spec(self) -> DataSpec:
        columns = self._known or self._columns
        context = ColumnContext(tuple(columns.context_names), columns.context_shape)
        return DataSpec(self.name, (len(columns.encoded),), context=context, columns=columns.encoded)

    def find(self) -> dict:
        """The folder of the simulations, and how many numbers each has."""
        return self.found or self._findings

    @cached_property
    def _functions(self) -> tuple[Product | Made, Callable, str]:
        """The prior, the simulator, and the name of the folder of their simulations."""
        for key, value in (("prior", self.prior), ("simulate", self.simulate)):
            if value is None:
                how = HOW if key == "prior" else "module:function, a function of the parameters"
                raise UsageError(f"dataset={self.name} needs dataset.{key}: {how}")
        find = self._find or _refuse_functions
        simulate = find("dataset.simulate", self.simulate)
        prior, text = make_prior(self.prior, find)
        if self.names and len(self.names) != len(prior.ends):
            self._refuse("names", [*self.names], f"the prior has {len(prior.ends)} parameters")
        digest = hashlib.sha256(json.dumps([1, self.simulate, text, self.batched, self.split_seed]).encode())
        for given in filter(lambda given: isinstance(given, str), (self.simulate, self.prior)):
            digest.update(_source(find("dataset.simulate" if given == self.simulate else "dataset.prior", given)))
        return prior, simulate, digest.hexdigest()[:16]

    @cached_property
    def _findings(self) -> dict:
        prior, simulate, folder = self._functions
        return {
            "folder": folder,
            "names": list(self.names or prior.names),
            "ends": [list(ends) for ends in prior.ends],
            "observed": self._width(prior, simulate, self._store(folder)),
        }

    def _width(self, prior, simulate, store: Store) -> int:
        """How many numbers a simulation has: of those that are kept, else of the first that does not fail."""
        if (kept := store.missing(self.rows)) != [(0, self.rows)]:
            rows = kept[0][0] if kept else self.rows
            theta, x, *_ = gather(store.read(rows)) if rows else ([], None)
            if len(theta):
                return x.shape[1]
        theta, why = draw_parameters(prior, 0, TRIES, self.split_seed), ""
        with same_random_state():
            for number, row in enumerate(theta):
                seed_everything(self.split_seed, 1, number)
                x, reason = simulate_row(simulate, row[None] if self.batched else row)
                if x is not None and len(x):
                    return len(x)
                why = why or reason or "it returned no numbers"
        raise FlowtrainError(f"dataset.simulate={self.simulate}: the first {TRIES} simulations failed: {why}")

    def _store(self, folder: str) -> Store:
        return Store(Path(self.root) / "simulations" / folder)

    @cached_property
    def _columns(self) -> Columns:
        """The columns without their moments."""
        found = self.find()
        observed = self.observed or [f"x{i}" for i in range(found["observed"])]
        if len(observed) != found["observed"]:
            self._refuse("observed", [*observed], f"a simulation has {found['observed']} numbers")
        names = found["names"]
        if both := {*names} & {*observed}:
            raise UsageError(f"dataset.observed: '{min(both)}' is the name of a parameter too")
        modelled = [Column(name, "real", low=low, high=high) for name, (low, high) in zip(names, found["ends"])]
        return Columns(tuple(modelled), tuple(Column(str(name), "real") for name in observed))

    def _open(self, name: str) -> ArraySplit:
        if not self._parts:
            self._read()
        return self._parts[name]

    def _read(self) -> None:
        columns = self._known or self._columns
        store = self._store(self.find()["folder"])
        on_first_rank(lambda: self._simulate(store))
        theta, x, failed, reason = gather(store.read(self.rows))
        if failed:
            line = "%s of %s simulations failed and are left out; the first: %s"
            log.warning(line, f"{failed:,}", f"{self.rows:,}", reason)
        if not len(theta):
            raise FlowtrainError(f"dataset.simulate={self.simulate}: all simulations failed: {reason}")
        if x.shape[1] != columns.context_shape[0]:
            raise FlowtrainError(f"{store.folder}: simulations of {x.shape[1]} numbers, not {columns.context_shape[0]}")
        parts = split_indices(len(theta), self.val_size, self.test_size, self.split_seed)
        if self._known is None:
            train = parts["train"]
            mean, std = moments(x[train])
            given = [
                replace(column, mean=float(mean[i]), std=float(std[i]) or 1.0)
                for i, column in enumerate(columns.context)
            ]
            self._known = replace(Columns(columns.modelled).with_moments(theta[train]), context=tuple(given))
        for part, rows in parts.items():
            how = f"{self.name} {part}: {len(rows):,} simulations by {self.simulate} in {store.folder}"
            context = self._known.standardize_context(x[rows])
            self._parts[part] = ArraySplit(torch.from_numpy(theta[rows]), how, context, self._known)

    def _simulate(self, store: Store) -> None:
        if not store.missing(self.rows):
            return
        try:
            prior, simulate, folder = self._functions
        except UsageError as error:
            raise UsageError(f"{error} ({store.folder} lacks simulations)") from error
        if folder != store.folder.name:
            raise FlowtrainError(
                f"dataset.simulate={self.simulate}: it has changed since the run began, whose simulations are no longer"
                f" in {store.folder}"
            )
        width = self.find()["observed"]
        with store.lock():
            missing = sum(stop - first for first, stop in store.missing(self.rows))
            if not missing:  # another run has simulated them meanwhile
                return
            line = "simulating %s rows in %d processes; they are kept in %s"
            log.info(line, f"{missing:,}", self.workers, store.folder)
            simulate_into(store, self.rows, width, prior, simulate, self.split_seed, self.batched, self.workers)
            store.merge(self.rows)


def _source(function: Callable) -> bytes:
    """The source of the module in which a function is defined: what it calls there matters too."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    try:
        return Path(module.__file__).read_bytes()
    except (OSError, TypeError, AttributeError):
        return repr(function).encode()


def _refuse_functions(key: str, given: str) -> Callable:
    raise UsageError(f"{key}={given}: functions cannot be found from here")
