"""samples/, the images of a run."""

from __future__ import annotations

from flowtrain.engine.loggers.logger import NullLogger
from flowtrain.plots.grid import save_png


class ImageFiles(NullLogger):
    """Writes each image to samples/<name>_<step>.png."""

    def open(self, run):
        self.directory = run.directory / "samples"

    def image(self, step, name, image):
        save_png(image, self.directory / f"{name}_{step:08d}.png")
