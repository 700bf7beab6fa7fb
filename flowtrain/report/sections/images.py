"""Images: samples, interpolations, classes, nearest training images."""

from __future__ import annotations

import numpy as np

from flowtrain.report.grids import grid
from flowtrain.report.material import Images, Material, Neighbours
from flowtrain.report.page import Page, Picture

COLUMNS = 8
WIDTH = 252  # of a grid on the page
BINS = 24


def add(page: Page, material: Material) -> None:
    images = material.images
    _samples(page, material, images)
    _classes(page, material, images)
    _interpolations(page, material, images)


def _samples(page: Page, material: Material, images: Images) -> None:
    section = page.section("Samples")
    given = " Each sample has the class of the real image at its place." if images.labels else ""
    columns = COLUMNS if len(images.real) > 16 else 4
    pictures = [
        Picture(grid(images.real, columns), f"{len(images.real)} validation images of {material.name}", "real", WIDTH)
    ]
    for temperature, samples in sorted(images.samples.items()):
        text = f"temperature {temperature:g}"
        pictures.append(Picture(grid(samples, columns), f"{len(samples)} samples at {text}", text, WIDTH))
    caption = (
        "Validation images beside samples of the model. The temperature scales the latent: 1 is the model itself, less"
        f" gives likelier and less varied samples. The same noise at each.{given}"
    )
    section.pictures(pictures, caption)
    if images.shrunk:
        section.note("All images are shown reduced in size.")
    for note in material.notes.get("samples", ()):
        section.note(note)


def _classes(page: Page, material: Material, images: Images) -> None:
    section = page.section("Classes")
    if images.classes:
        rows = [grid(samples, len(samples)) for samples in images.classes.values()]
        pictures = [
            Picture(row, f"samples of the class {name}", name, 4 * WIDTH // 2)
            for name, row in zip(images.classes, rows)
        ]
        section.pictures(pictures, "Samples of each class, at temperature 1.")
    for note in material.notes.get("classes", ()):
        section.note(note)


def _interpolations(page: Page, material: Material, images: Images) -> None:
    section = page.section("Interpolations")
    if images.interpolations is not None:
        rows, steps = images.interpolations.shape[:2]
        picture = Picture(
            grid(images.interpolations.reshape(-1, *images.interpolations.shape[2:]), steps),
            f"{rows} interpolations of {steps} steps between validation images",
        )
        of = " of one class" if images.labels else ""
        section.pictures(
            [picture],
            f"Each row begins and ends with a real validation image; between them lie {steps - 2} images at equal"
            f" steps along the great circle between the two latents (spherical interpolation). Pairs{of} are chosen by"
            " chance.",
        )
        if burst := count_burst(images.interpolations):
            section.note(
                f"In {burst} of the {rows * (steps - 2)} images between, most numbers are at an end of their range: the"
                " inverse grows without bound between these latents, where there were no training images."
            )
    for note in material.notes.get("interpolations", ()):
        section.note(note)


def count_burst(interpolations: np.ndarray) -> int:
    """The number of images between the ends, in (rows, steps, H, W, C), whose share of numbers at an end of their range
    is higher by more than a half than that of both ends."""
    extreme = ((interpolations == 0) | (interpolations == 255)).mean((2, 3, 4))
    return int((extreme[:, 1:-1] > extreme[:, [0, -1]].max(1, keepdims=True) + 0.5).sum())


def add_neighbours(page: Page, material: Material) -> None:
    """Samples beside the training images nearest to them."""
    section = page.section("Nearest training images")
    found = None if material.images is None else material.images.neighbours
    if found is not None:
        pictures = [
            Picture(
                grid(np.stack(pair), 1),
                f"a sample, and below it the training image nearest to it at distance {distance:.3g}",
                f"{distance:.3g}",
                max(64, pair[0].shape[1] + 2),
            )
            for *pair, distance in found.pictures
        ]
        of = f"{found.searched:,} of the {found.total:,} training images were searched."
        section.pictures(
            pictures,
            "Samples at temperature 1, each above the training image nearest to it, with their Euclidean distance"
            f"{', each pixel from 0 to 1' if material.grey_levels else ''}. {of}",
        )
        both = np.concatenate([found.samples, found.validation])
        edges = np.linspace(both.min(), both.max() or 1.0, BINS + 1)
        counts = {
            name: np.histogram(values, edges)[0] / len(values)
            for name, values in (("samples", found.samples), ("validation images", found.validation))
        }
        marks = {"samples": found.samples.mean(), "validation images": found.validation.mean()}
        section.histogram("Distance to the nearest training image", edges, counts, x="distance", y="share", marks=marks)
        section.text(_memorizing(found))
    for note in material.notes.get("neighbours", ()):
        section.note(note)


def _memorizing(found: Neighbours) -> str:
    """What the distances tell: samples that are much closer than images never trained on were copied."""
    samples, real = np.median(found.samples), np.median(found.validation)
    limit = np.quantile(found.validation, 0.05)
    close = float((found.samples < limit).mean())
    text = f"The median distance of a sample is {samples:.3g}, that of a validation image {real:.3g}. "
    if close > 0.25 and samples < 0.8 * real:
        return text + (
            f"{100 * close:.0f} % of the samples are nearer to a training image than all but the nearest 5 % of"
            " validation images are: the model may repeat training images."
        )
    if samples > 1.25 * real:
        return text + "Samples lie farther from the training images than real images do: nothing is memorized."
    return text + "Samples are about as far from the training images as new real images are: no sign of memorizing."
