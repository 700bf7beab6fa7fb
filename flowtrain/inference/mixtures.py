"""Gaussian mixtures and kernel densities, as bases of flows: densities that need no gradients."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from flowtrain.bijections import Flatten
from flowtrain.distributions import NormalMixture
from flowtrain.flow import Flow
from flowtrain.flows.parts import chain, standardize
from flowtrain.inference.given import Given
from flowtrain.runtime.seeds import generator
from flowtrain.training.start import fit_to_data

COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of short tables
MANY_COMPONENTS = (32, 100, 64, 8, 2)  # of others, in the order in which they are tried
MOST_ROWS = 20_000  # that a mixture is fitted to by expectation-maximization
MOST_KERNELS = 12_000  # rows of which a kernel density is made: its cost grows with them
MOST_COMPARED = 2**22  # pairs of rows for training and validation by which a bandwidth is chosen
RIDGES = (1e-6, 1e-2)  # added to variances; the second for short tables
SHORT = 2_000  # rows


@dataclass(frozen=True)
class Mixture:
    """A mixture of normals for standardized rows.

    Attributes:
        base: fitted to the rows for training.
        refit: fits the same to other rows (N, D).
        seconds: that it takes.
    """

    name: str
    base: NormalMixture
    refit: Callable[[Tensor], NormalMixture]
    seconds: float


def standardized(data: Given, seed: int) -> tuple[Flow, Tensor, Tensor]:
    """A flow that only standardizes, and the rows for training and for validation as it maps them."""
    links = chain(preprocess=partial(standardize, columns=data.spec.columns), flatten=Flatten)
    flow = Flow(data.spec.shape, links)
    fit_to_data(flow, data.train, seed)
    flow.eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        return flow, *(flow.bijection(part.data)[0] for part in (data.train, data.val))


def gaussian_mixture(train: Tensor, val: Tensor, seed: int, seconds: float) -> Mixture | None:
    """The best mixture on ``val`` (n, D) that expectation-maximization finds for ``train`` in so many ``seconds``.

    scikit-learn's GaussianMixture, for growing numbers of components with full, tied and diagonal covariances.
    """
    from sklearn.base import clone
    from sklearn.mixture import GaussianMixture

    best, until, each = None, time.monotonic() + seconds, 0.0  # seconds for each component
    numbers = [*product(COMPONENTS, RIDGES)] if len(train) < SHORT else [(many, RIDGES[0]) for many in MANY_COMPONENTS]
    for kind in ("full", "tied", "diag"):
        worse, own = 0, -math.inf  # since the best of this kind
        for components, ridge in numbers:
            if worse > 3 or 3 * components > len(train):
                break
            if time.monotonic() + each * components > until:
                continue
            model = GaussianMixture(components, covariance_type=kind, reg_covar=ridge, random_state=seed)
            began = time.monotonic()
            found = _fitted(model, train)
            took = time.monotonic() - began
            each = took / components
            score = -math.inf if found is None else found.score(val.double().numpy())
            worse, own = (0, score) if score > own else (worse + 1, own)
            if best is None or score > best[0]:
                name = f"gaussian_mixture(components={components}, {kind}{', regularized' if ridge > 1e-3 else ''})"
                best = score, name, found, took
    if best is None or best[2] is None:
        return None
    _, name, found, took = best
    return Mixture(name, _base_of(found), lambda rows: _base_of(_fitted(clone(found), rows) or found), took)


def _fitted(model, rows: Tensor):
    """``model`` after expectation-maximization; None where that fails."""
    if len(rows) > MOST_ROWS:
        rows = rows[torch.randperm(len(rows), generator=generator(model.random_state))[:MOST_ROWS]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged: validation decides
        try:
            return model.fit(rows.double().numpy())
        except ValueError:  # a covariance is not positive definite
            return None


def _base_of(found) -> NormalMixture:
    """scikit-learn's mixture as a base."""
    factor = torch.from_numpy(found.precisions_cholesky_)  # (K, D, D), of all components (D, D), or diagonals (K, D)
    if found.covariance_type == "tied":
        factor = factor[None]
    elif found.covariance_type == "diag":
        factor = torch.diag_embed(factor)
    return _base(torch.from_numpy(found.weights_).log(), torch.from_numpy(found.means_), factor)


def kernel_density(train: Tensor, val: Tensor) -> Mixture | None:
    """A kernel at each row of ``train``: of the bandwidth and the shape, round or that of the rows' covariance, that
    make ``val`` most likely."""
    if len(train) > MOST_KERNELS:
        return None
    best, val = None, val[: MOST_COMPARED // len(train)].double()
    for shape, factor in _shapes(train.double()):
        squares = torch.cdist(val @ factor, train.double() @ factor).square()
        log_det = factor.slogdet()[1]

        def score(log_width: float) -> float:
            each = -0.5 * squares * math.exp(-2 * log_width)
            return float(each.logsumexp(1).mean() + log_det) - train.shape[1] * log_width

        widths = torch.linspace(math.log(0.01), math.log(2.0), 16).tolist()
        step = widths[1] - widths[0]
        log_width = max(widths, key=score)
        for _ in range(3):
            step /= 2.5
            log_width = max((log_width - step, log_width, log_width + step), key=score)
        if best is None or score(log_width) > best[0]:
            best = score(log_width), f"kernel_density(bandwidth={math.exp(log_width):.3g}, {shape})", factor, log_width
    _, name, factor, log_width = best
    scaled = factor[None] * math.exp(-log_width)

    def kernels(rows: Tensor) -> NormalMixture:
        return _base(torch.zeros(len(rows)), rows, scaled)

    return Mixture(name, kernels(train), kernels, 0.0)


def _shapes(rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and factors P of kernels: round ones, and ones with the covariance of ``rows``."""
    dims = rows.shape[1]
    yield "round", torch.eye(dims, dtype=rows.dtype)
    if dims > 1:
        covariance = rows.T.cov().reshape(dims, dims) + 1e-6 * torch.eye(dims, dtype=rows.dtype)
        yield "correlated", torch.linalg.cholesky(torch.linalg.inv(covariance))


def _base(logits: Tensor, mean: Tensor, factor: Tensor) -> NormalMixture:
    base = NormalMixture(mean.shape[1:], 1)
    base.logits, base.mean, base.factor = (
        torch.nn.Parameter(value.float(), requires_grad=False) for value in (logits, mean, factor)
    )
    return base
