"""The report of a run: its records and material as a page."""

from __future__ import annotations

from flowtrain.report.material import Material
from flowtrain.report.page import Page
from flowtrain.report.run import Configuration, RunRecord
from flowtrain.report.sections import figures, images, learning, likelihoods, provenance, rows


def render(record: RunRecord, material: Material, configuration: Configuration) -> Page:
    """The page of a run."""
    data = configuration.config["dataset"].get("name") or material.name
    model = str(configuration.config["model"].get("_target_", "flow")).rpartition(".")[2]
    page = Page(f"{model} on {data}", " · ".join(_facts(record, material)))
    figures.add(page, record, material)
    learning.add(page, record)
    if material.images is not None:
        images.add(page, material)
    else:
        rows.add(page, material)
    likelihoods.add(page, material)
    likelihoods.add_extremes(page, material)
    if material.is_image:
        images.add_neighbours(page, material)
    provenance.add(page, record, configuration, material.seconds)
    return page


def _facts(record: RunRecord, material: Material) -> list[str]:
    facts = [(record.directory or record.checkpoint).name]
    if material.sizes.get("train"):
        facts.append(f"{material.sizes['train']:,} training examples of {material.dimensions:,} numbers")
    if record.summary:
        facts.append(f"{record.summary['parameters']:,} parameters")
        facts.append(f"{record.summary['steps']:,} steps")
    return facts
