"""``model="auto"``: the density that validation prefers, of mixtures and of flows of several families and sizes."""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from flowtrain.commands.evaluation import evaluate_split
from flowtrain.engine.auto import SMALL
from flowtrain.engine.evaluate import plus_minus
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.inference.given import Given
from flowtrain.inference.mixtures import Mixture, gaussian_mixture, kernel_density, standardized
from flowtrain.inference.training import Trained, train, training_config
from flowtrain.runtime.borrowed import quiet
from flowtrain.runtime.seeds import TURN

log = logging.getLogger("flowtrain")

AUTO = "auto"
MIXTURES = 0.2  # of the time, for mixtures
ROUNDS = ((0.3, 3), (0.3, 1), (0.4, 0))  # shares of the time that is left for flows, and how many go on
SECONDS = 3.0  # that a flow of the first round gets at least; fewer flows begin where there is less time
SHORT = (  # tables: few parameters, or dropout
    ("nsf_autoregressive", {"steps": 2, "hidden": 32, "dropout": 0.2}),
    ("maf", {"steps": 6, "hidden": 64, "dropout": 0.0}),
    ("nsf_coupling", {"pairs": 2, "hidden": 32, "dropout": 0.2}),
    ("nsf_autoregressive", {"steps": 1, "hidden": 64, "dropout": 0.5}),
    ("maf", {"steps": 3, "hidden": 64, "dropout": 0.2}),
    ("maf", {"steps": 5, "hidden": 128, "dropout": 0.2}),
)
LONG = (
    ("nsf_autoregressive", {"steps": 3, "hidden": 64}),
    ("nsf_autoregressive", {"steps": 3, "hidden": 128}),
    ("nsf_coupling", {"pairs": 3, "hidden": 128}),
    ("nsf_autoregressive", {"steps": 5, "hidden": 64}),
    ("maf", {"steps": 5, "hidden": 128}),
    ("nsf_autoregressive", {"steps": 2, "hidden": 256}),
)


@dataclass(frozen=True)
class Candidate:
    """What was tried, and its log-likelihood of the rows for validation: mean and standard error, in nats a row."""

    name: str
    log_likelihood: float
    log_likelihood_stderr: float | None
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Choice:
    """The chosen density, all that was tried, the best first, and why."""

    trained: Trained
    name: str
    candidates: tuple[Candidate, ...]
    why: str


@dataclass
class _Trial:
    candidate: Candidate
    trained: Trained
    mixture: Mixture | None = None
    recipe: tuple[str, dict] | None = None

    @property
    def mean(self) -> float:
        return self.candidate.log_likelihood


def choose(data: Given, options: dict, seed: int, device: torch.device, deadline: float, show: bool) -> Choice:
    """Choose by successive halving (Jamieson and Talwalkar 2016): in each of three rounds the best go on, with more
    time, from the start. Mixtures come first, in a share of the time.

    Raises:
        UsageError: ``options`` set the model, or there is no time limit.
        FlowtrainError: nothing could be fitted.
    """
    if any(key.partition(".")[0] == "model" for key in options):
        raise UsageError("options: with model='auto', the model is chosen; leave out model.…")
    if not math.isfinite(deadline):
        raise UsageError("minutes=None: model='auto' needs a limit")
    chooser = _Chooser(data, options, seed, device, deadline, show)
    trials = [*chooser.mixtures(), *chooser.flows()]
    if not trials:
        raise FlowtrainError("model='auto': none of its flows could be trained")
    trials.sort(key=lambda trial: trial.mean, reverse=True)
    chosen, why = trials[0], _why(trials)
    if chosen.mixture is not None:
        chosen.trained.flow.base = chooser.refit(chosen)
    chooser.say(f"model=auto: {why}")
    return Choice(chosen.trained, chosen.candidate.name, tuple(trial.candidate for trial in trials), why)


class _Chooser:
    """Tries one density after another; its deadline leaves time to fit a mixture once more."""

    def __init__(self, data, options, seed, device, deadline, show):
        self.data, self.options, self.seed, self.device = data, options, seed, device
        self.deadline, self.show = deadline, show

    def say(self, line: str) -> None:
        log.info("%s", line)
        if self.show:
            print(line, file=sys.stderr)

    def mixtures(self) -> Iterator[_Trial]:
        """Mixtures of normals, which take no contexts and no angles."""
        data = self.data
        if data.spec.context or any(column.kind == "angle" for column in data.spec.columns):
            return
        with TURN:
            flow, self.rows, val = standardized(data, self.seed)
        seconds = MIXTURES * (self.deadline - time.monotonic())
        config = training_config("maf", self.options, len(data.train), self.seed)
        for find in (
            partial(kernel_density, self.rows, val),
            partial(gaussian_mixture, self.rows, val, self.seed, seconds),
        ):
            began = time.monotonic()
            found = find()
            if found is None:
                continue
            own = copy.deepcopy(flow)
            own.base = found.base
            own.to(self.device)
            evaluation = evaluate_split(own, data.val, config)
            trained = Trained(own.eval(), evaluation, 0, time.monotonic() - began, ())
            self.deadline -= found.seconds  # to fit it to all rows
            yield self._trial(found.name, trained, mixture=found)

    def refit(self, trial: _Trial):
        """The base of a chosen mixture, fitted to the rows for validation too."""
        own = trial.trained.flow
        with torch.no_grad():
            val = own.bijection(self.data.val.to(self.device).data)[0].cpu()
        return trial.mixture.refit(torch.cat([self.rows, val])).to(self.device)

    def flows(self) -> Iterator[_Trial]:
        """Each flow that was trained, in rounds."""
        short = len(self.data.train) < SMALL
        left = self.deadline - time.monotonic()
        number = max(1, int(ROUNDS[0][0] * left / SECONDS))
        field = [*(SHORT if short else LONG)][:number]
        for part, (_, keep) in enumerate(ROUNDS):
            if len(field) <= keep and part < len(ROUNDS) - 1:  # all would go on
                continue
            rest = sum(share for share, _ in ROUNDS[part:])
            ends = time.monotonic() + (self.deadline - time.monotonic()) * ROUNDS[part][0] / rest
            trials = []
            for place, recipe in enumerate(field):
                now = time.monotonic()
                trial = self._train(*recipe, now + (ends - now) / (len(field) - place))
                if trial is not None:
                    trials.append(trial)
                    yield trial
            trials.sort(key=lambda trial: trial.mean, reverse=True)
            field = [trial.recipe for trial in trials][:keep]

    def _train(self, model: str, knobs: dict, deadline: float) -> _Trial | None:
        named = {f"model.{key}": value for key, value in knobs.items()}
        name = f"{model}({', '.join(f'{key}={value}' for key, value in knobs.items())})"
        config = training_config(model, named | self.options, len(self.data.train), self.seed)
        try:
            with quiet():
                trained = train(config, self.data, self.device, deadline, False)
        except UsageError:
            raise
        except FlowtrainError as error:
            self.say(f"model=auto: {name}: {error}")
            return None
        return self._trial(name, trained, recipe=(model, knobs))

    def _trial(self, name: str, trained: Trained, **more) -> _Trial:
        evaluation = trained.evaluation
        parameters = sum(parameter.numel() for parameter in trained.flow.parameters())
        mean, error = evaluation.log_likelihood, evaluation.log_likelihood_stderr
        self.say(f"model=auto: {plus_minus(mean, error)} nats, {name}, {trained.seconds:.1f} s")
        return _Trial(Candidate(name, mean, error, trained.seconds, parameters), trained, **more)


def _why(trials: list[_Trial]) -> str:
    """Why the first of the ``trials``, which are sorted."""
    best, *others = trials
    why = f"{best.candidate.name} is the best on the rows for validation"
    second = next((trial for trial in others if trial.candidate.name != best.candidate.name), None)
    if second is None:
        return why
    return f"{why}, by {plus_minus(*_difference(best, second), 3)} nats before {second.candidate.name}"


def _difference(one: _Trial, other: _Trial) -> tuple[float, float]:
    """Mean and standard error of the difference of two trials' log-likelihoods of the same rows."""
    gaps = one.trained.evaluation.each - other.trained.evaluation.each
    return float(gaps.mean()), float(gaps.std() / math.sqrt(len(gaps)))
