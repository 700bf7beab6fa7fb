"""``flowtrain.DensityEstimator``: a flow as an estimator of scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from flowtrain.engine.memory_budget import few_rows
from flowtrain.inference.fit import fit
from flowtrain.inference.given import LEAST
from flowtrain.runtime.borrowed import borrowed_torch


class DensityEstimator(DensityMixin, BaseEstimator):
    """The density of rows, estimated by :func:`flowtrain.fit`, with scikit-learn's interface.

    Args:
        model, minutes, val_size, options, device: as of :func:`flowtrain.fit`.
        random_state: a whole number: the seed; None or a ``RandomState``: one that is drawn at each ``fit``.
        progress: whether to show a bar or log lines.

    Attributes:
        flow_: the :class:`flowtrain.Flow`, trained in float32, which computes in float64; with its ``fitted``.
        n_features_in_: D, the number of columns.
        feature_names_in_: their names, where X was a DataFrame with texts as names.

    >>> import numpy as np, flowtrain
    >>> x = np.random.default_rng(0).normal(size=(200, 2))
    >>> estimator = flowtrain.DensityEstimator(minutes=0.02, random_state=0).fit(x)
    >>> estimator.score_samples(x).shape, estimator.sample(5).shape
    ((200,), (5, 2))
    """

    def __init__(
        self,
        model="nsf_coupling",
        *,
        minutes=1.0,
        val_size=None,
        options=None,
        device=None,
        random_state=1,
        progress=False,
    ):
        self.model = model
        self.minutes = minutes
        self.val_size = val_size
        self.options = options
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def fit(self, X, y=None) -> DensityEstimator:
        """Fit the density of the rows of X (N, D); ``y`` is ignored. Returns the estimator."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=LEAST)
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        self.flow_ = fit(
            X,
            model=self.model,
            minutes=self.minutes,
            val_size=self.val_size,
            options=self.options,
            seed=int(seed),
            device=self.device,
            progress=self.progress,
        ).double()
        return self

    def score_samples(self, X) -> np.ndarray:
        """The log-density of each row of X (N, D), in nats: (N,) float64."""
        check_is_fitted(self)
        rows = torch.from_numpy(np.ascontiguousarray(validate_data(self, X, dtype=np.float64, reset=False)))
        device, most = next(self.flow_.parameters()).device, few_rows(rows.shape[1])
        with torch.no_grad():
            return torch.cat([self.flow_.log_prob(part.to(device)).cpu() for part in rows.split(most)]).numpy()

    def score(self, X, y=None) -> float:
        """The mean log-density of the rows of X, in nats, as of scikit-learn's GaussianMixture; ``GridSearchCV``
        maximizes it."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state=None) -> np.ndarray:
        """Rows of the density, (n_samples, D) float64; ``random_state`` says which."""
        check_is_fitted(self)
        seed = check_random_state(random_state).randint(2**31 - 1)
        with borrowed_torch():
            generator = torch.Generator().manual_seed(seed)
            return self.flow_.sample(n_samples, generator=generator).cpu().numpy()
