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
    where = str(record.directory or record.checkpoint)
    page = Page(f"{model} on {data}", where)
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
    provenance.add(page, record, configuration)
    return page
