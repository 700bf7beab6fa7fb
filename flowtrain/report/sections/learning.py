"""Learning curves."""

from __future__ import annotations

import numpy as np

from flowtrain.report.page import Page, Scale, Section, Series
from flowtrain.report.run import Curve, RunRecord

POINTS = 400  # most of a curve; more become means of neighbours
UNITS = {
    "bits_per_dim": "bits/dim",
    "log_likelihood": "nats",
    "elbo": "nats",
    "half_renyi": "nats",
    "matching_loss": "a dimension",
}
TITLES = {
    "elbo": "Evidence lower bound",
    "half_renyi": "Half the Rényi divergence of order 2",
    "matching_loss": "Flow-matching loss",
}
CUT = 5  # times as wide as the rest: then the first tenth of the steps is left out


def add(page: Page, record: RunRecord) -> None:
    section = page.section("Learning")
    metrics = record.metrics
    for key, unit in UNITS.items():
        curves = {"train": metrics.get(f"train/{key}"), "validation": metrics.get(f"val/{key}")}
        found = {name: curve for name, curve in curves.items() if curve is not None}
        if found:
            _likelihood(section, TITLES.get(key, "Likelihood"), found, unit)
    rate, norm = metrics.get("train/lr"), metrics.get("train/gradient_norm")
    if rate is not None:
        _one(section, "Learning rate", "learning rate", rate, "learning rate")
    if norm is not None:
        _one(section, "Gradient norm, before it is clipped", "norm", norm, "norm")
    skipped = metrics.get("train/skipped_steps")
    if skipped is not None and np.nanmax(skipped.values) > 0:
        _one(section, "Skipped steps, so far", "skipped steps", skipped, "steps whose gradient was not finite")
    if summary := record.summary:
        text = f"{summary['steps']:,} steps in {_duration(summary['seconds'])}; {summary['parameters']:,} parameters."
        skipped, back = summary.get("skipped_steps", 0), summary.get("rollbacks", 0)
        if skipped or back:
            text += f" {skipped:,} steps were skipped since their gradient was not finite, {back:,} rolled back."
        if summary.get("unreadable"):
            text += f" {summary['unreadable']:,} unreadable images were left out."
        section.note(text)


def _likelihood(section: Section, title: str, found: dict[str, Curve], unit: str) -> None:
    """Both curves. A wild start, which would flatten the rest, is left out with a word."""
    last = max(curve.steps[-1] for curve in found.values())
    rest = np.concatenate([curve.values[curve.steps > 0.1 * last] for curve in found.values()])
    every = np.concatenate([curve.values for curve in found.values()])
    note = ""
    finite, late = every[np.isfinite(every)], rest[np.isfinite(rest)]
    if len(late) > 10 and np.ptp(finite) > CUT * np.ptp(late):
        found = {name: _after(curve, 0.1 * last) for name, curve in found.items()}
        note = (
            f"The first tenth of the steps is not shown: there it ranged from {finite.min():.4g} to {finite.max():.4g}."
        )
    missing = int((~np.isfinite(every)).sum())
    if missing:
        note += f" Not finite, which leaves gaps: {missing} of {len(every)} values."
    series = [Series(name, *_thin(curve)) for name, curve in found.items()]
    section.lines(title, series, x="step", y=unit, note=note.strip())


def _one(section: Section, title: str, name: str, curve: Curve, y: str) -> None:
    steps, values = _thin(curve)
    positive = values[np.isfinite(values) & (values > 0)]
    scale: Scale = "log" if len(positive) and positive.max() > 30 * positive.min() and (values >= 0).any() else "linear"
    if scale == "log" and len(positive) < np.isfinite(values).sum():
        scale = "linear"
    section.lines(title, [Series(name, steps, values)], x="step", y=y, y_scale=scale)


def _after(curve: Curve, step: float) -> Curve:
    kept = curve.steps > step
    return Curve(curve.steps[kept], curve.values[kept]) if kept.any() else curve


def _thin(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """At most ``POINTS`` points: means over runs of neighbours, without those that are not finite."""
    times = -(-len(curve.steps) // POINTS)
    if times <= 1:
        return curve.steps, curve.values
    values = np.concatenate([curve.values, np.full(-len(curve.values) % times, np.nan)]).reshape(-1, times)
    known = np.isfinite(values)
    count = known.sum(1)
    means = np.where(count, np.where(known, values, 0).sum(1) / np.maximum(count, 1), np.nan)
    return curve.steps[::times], means


def _duration(seconds: float) -> str:
    """A length of time as people say it.

    >>> _duration(75), _duration(8000)
    ('1 min 15 s', '2 h 13 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
