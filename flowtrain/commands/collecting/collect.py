"""All material of a report, the most important first, so that what is slow does not crowd out the rest."""

from __future__ import annotations

from flowtrain.commands.collecting import images, likelihoods, rows
from flowtrain.commands.collecting.source import Source, attempt
from flowtrain.data.spec import has_bits
from flowtrain.report.material import Material
from flowtrain.report.run import RunRecord


def collect(source: Source, record: RunRecord) -> Material:
    """Gather what a report shows of a flow and its data.

    One process does this alone. What fails, or does not fit into the time, is left out with a sentence that says so.
    """
    source.flow.eval()
    spec = source.spec
    material = Material(
        name=spec.name,
        dimensions=source.flow.dimensions,
        has_bits=has_bits(spec, source.columns),
        grey_levels=spec.grey_levels,
        is_image=spec.is_image,
        lower_bound=spec.has_gaps,
        has_target=spec.target is not None,
    )
    likelihoods.gather(material, source, record)
    with attempt(material, "samples"):
        (images if spec.is_image else rows).gather(material, source)
    if not material.has_target:
        with attempt(material, "extremes"):
            likelihoods.gather_extremes(material, source)
    material.seconds = source.seconds
    return material
