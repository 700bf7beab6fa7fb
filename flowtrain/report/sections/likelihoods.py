"""Likelihoods of single examples: their histogram, and the most and the least likely."""

from __future__ import annotations

import numpy as np

from flowtrain.report.material import Extreme, Material
from flowtrain.report.page import Page, Picture, Section
from flowtrain.report.sections.figures import NAMES

BINS = 40


def add(page: Page, material: Material) -> None:
    section = page.section("log p − log q of each sample" if material.has_target else "Likelihood of each example")
    found = {name: material.likelihoods[name] for name in ("train", "val", "test") if name in material.likelihoods}
    if found:
        values = {NAMES[name]: material.to_unit(one.each) for name, one in found.items()}
        every = np.concatenate([*values.values()])
        low, high = np.quantile(every, [0.005, 0.995])
        margin = 0.05 * (high - low) or 0.5
        edges = np.linspace(low - margin, high + margin, BINS + 1)
        counts = {name: np.histogram(one, edges)[0] / len(one) for name, one in values.items()}
        marks = {NAMES[name]: material.to_unit(one.mean) for name, one in found.items()}
        outside = int(((every < edges[0]) | (every > edges[-1])).sum())
        note = "Broken lines are means."
        if outside:
            note += f" Beyond the axis: {outside:,} example{'s' * (outside > 1)}."
        x = "bits/dim" if material.has_bits else "nats"
        title = "Logarithms of importance weights" if material.has_target else "Train, validation and test"
        section.histogram(title, edges, counts, x=x, marks=marks, note=note)


def add_extremes(page: Page, material: Material) -> None:
    section = page.section("Most and least likely examples")
    found = material.extremes
    if found is not None:
        split = NAMES[found.split]
        _extremes(section, material, found.most, f"The most likely of the {split} split", found.columns)
        _extremes(section, material, found.least, f"The least likely of the {split} split", found.columns)
    for note in material.notes.get("extremes", ()):
        section.note(note)


def _extremes(section: Section, material: Material, examples: list[Extreme], title: str, columns) -> None:
    unit = material.unit
    texts = [f"{material.to_unit(one.nats):.3f}".replace("-", "−") for one in examples]
    if columns:
        rows = [[text, *one.row] for text, one in zip(texts, examples)]
        section.table([unit, *columns], rows, title)
        return
    pictures = [
        Picture(one.pixels, f"an image of {text} {unit}", text, max(64, one.pixels.shape[1]))
        for text, one in zip(texts, examples)
    ]
    section.pictures(pictures, f"{title}, with their {unit}.")
