"""The likelihoods of each split, or of some of its examples, and the most and least likely examples."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.commands.collecting.rows import show
from flowtrain.commands.collecting.source import Source, attempt
from flowtrain.commands.eval import compare, links_to_logits
from flowtrain.engine.evaluate import Evaluation, evaluation_mode, log_likelihoods, summarize
from flowtrain.engine.memory_budget import few_rows, rows_within_budget
from flowtrain.plots.grid import to_pixels
from flowtrain.report.material import Extreme, Extremes, Material, SplitLikelihoods
from flowtrain.report.run import RunRecord
from flowtrain.runtime import global_batch, seeds

SHARES = {"test": 0.15, "val": 0.12, "train": 0.12}  # of the budget of time, the most important first
FIRST, GROWTH = 8, 4  # examples of the first batch, and of the next for each of the last
EXTREMES = 12  # images; rows half as many


def gather(material: Material, source: Source, record: RunRecord) -> None:
    """Fill in likelihoods and the published figure."""
    shares = {"val": SHARES["val"]} if material.has_target else SHARES  # all its splits are samples of the flow
    for name, share in shares.items():
        with attempt(material, "likelihoods"):
            known = _of_evaluation(source, record, name)
            split = source.split(name)
            material.sizes[name] = len(split)
            if known is None:
                known = _evaluate(source, name, source.share(share))
            elif not source.example_seconds:
                _evaluate(source, name, source.share(share / 4))  # for the time that an example takes
            if name == "val" and not known.source and source.as_trained:
                known = _of_training(known, record)
            material.likelihoods[name] = known
    if source.config.published and not source.config.smoke:
        with attempt(material, "figures"):
            material.published = _published(material, source, record)


def gather_extremes(material: Material, source: Source) -> None:
    """Fill in the most and the least likely examples of the test split, or of another that was evaluated."""
    found = next((material.likelihoods[name] for name in SHARES if name in material.likelihoods), None)
    if found is None:
        return
    count = min(EXTREMES if material.is_image else EXTREMES // 2, len(found.each) // 2)
    order = np.argsort(found.each)
    parts = {"most": order[::-1][:count], "least": order[:count]}
    sides: dict[str, list[Extreme]] = {}
    for side, places in parts.items():
        x, _ = source.split(found.split).take(torch.from_numpy(found.index[places].copy()))
        nats = found.each[places].tolist()
        if material.is_image:
            pixels = to_pixels(x, source.spec.grey_levels).movedim(1, 3).numpy()
            sides[side] = [Extreme(one, pixels=image) for one, image in zip(nats, pixels)]
        elif source.columns:
            rows = zip(*(map(show, values) for values in source.columns.decode(x).values()))
            sides[side] = [Extreme(one, row=list(row)) for one, row in zip(nats, rows)]
        else:
            return
    names = [] if material.is_image else [*source.columns.decode(x[:0])]
    material.extremes = Extremes(found.split, sides["most"], sides["least"], names)


def _of_evaluation(source: Source, record: RunRecord, name: str) -> SplitLikelihoods | None:
    """What ``flowtrain eval`` of this checkpoint found, where it did."""
    found = record.evaluation(name)
    if found is None:
        return None
    path, report = found
    array = record.directory / Path(path).with_name("log_likelihoods.npy")
    if not array.is_file():
        return None
    each = np.load(array)
    index = np.flatnonzero(np.isfinite(each))
    split = source.split(name)
    same = report["data"] == split.description and len(each) == len(split) and len(index)
    if not same or source.weights not in (None, report["weights"]):
        return None
    mean, stderr = report["log_likelihood"], report["log_likelihood_stderr"]
    return SplitLikelihoods(name, mean, stderr, report["examples"], len(each), each[index], index, path)


def _of_training(found: SplitLikelihoods, record: RunRecord) -> SplitLikelihoods:
    """With the mean that training ended with, over the whole validation split, where that is of this checkpoint."""
    summary = record.summary
    if Path(str(summary.get("checkpoint"))).name != record.checkpoint.name:
        return found
    key = "elbo" if "elbo" in summary else "log_likelihood"
    mean, stderr = summary[key], summary[f"{key}_stderr"]
    return replace(found, mean=mean, stderr=stderr, examples=found.total, source="summary.json")


def _evaluate(source: Source, name: str, seconds: float) -> SplitLikelihoods:
    """Evaluate examples of a split in a random order until ``seconds`` have passed: at least one batch."""
    split, flow = source.split(name), source.flow
    total = len(split)
    order = torch.randperm(total, generator=seeds.generator(source.config.seed, len(name)))
    order = order[: source.amounts.examples]
    sums = torch.zeros(3, total, dtype=torch.float64)
    few = few_rows(flow.dimensions)
    began, start, rows, most = time.monotonic(), 0, min(FIRST, few), 0

    def work(index: Tensor) -> None:
        x, context = split.take(index)
        mean, weighted = log_likelihoods(flow, index.to(x.device), x, context, 1, source.config.seed, split.measure)
        sums[:, index] = torch.stack([mean, weighted, torch.ones_like(mean)]).cpu()

    with torch.no_grad(), evaluation_mode(source.device):
        while start < len(order):
            index = order[start : start + rows].sort().values
            at = time.monotonic()
            if most:
                work(index)
            else:
                most = max(few, rows_within_budget(partial(work, index), len(index), source.device))
            start += len(index)
            took = time.monotonic() - at
            source.example_seconds = took / len(index)
            larger = min(GROWTH * rows, most)
            if time.monotonic() - began + took * larger / rows > seconds:
                break
            rows = larger
    result = summarize(*sums, split.weights, flow.dimensions)
    index = result.each.isfinite().nonzero().flatten()
    mean, stderr = result.log_likelihood, result.log_likelihood_stderr
    each = result.each[index].numpy()
    return SplitLikelihoods(name, mean, stderr, result.examples, total, each, index.numpy())


def _published(material: Material, source: Source, record: RunRecord) -> dict | None:
    """The published figure beside ours, as ``flowtrain eval`` has it."""
    published = source.config.published
    name = published.split
    if name not in material.likelihoods:
        return None
    found, split = material.likelihoods[name], source.split(name)
    if (known := record.evaluations.get(found.source, {}).get("published")) is not None:
        return known
    result = Evaluation(
        bits_per_dim=-found.mean / (material.dimensions * np.log(2)),
        bits_per_dim_stderr=None,
        log_likelihood=found.mean,
        log_likelihood_stderr=found.stderr,
        examples=found.examples,
        draws=1,
        each=torch.from_numpy(found.each),
    )
    logit = _logit_log_likelihood(source, found) if published.space == "logit" else None
    levels = source.spec.grey_levels
    return compare(published, result, material.dimensions, name, levels, split.description, logit)


@torch.no_grad()
def _logit_log_likelihood(source: Source, found: SplitLikelihoods) -> float | None:
    """Our log-likelihood in logit space, see ``flowtrain eval``; None where the flow has no logit."""
    preprocess = links_to_logits(source.flow)
    if preprocess is None:
        return None
    index = torch.from_numpy(found.index)
    total = 0.0
    for part in index.split(256):
        x, context = source.split(found.split).take(part)
        with global_batch.examples(part.to(x.device), source.config.seed, 0):
            total += preprocess(x, context)[1].double().sum().item()
    return found.mean - total / len(index)
