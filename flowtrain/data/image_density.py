"""A grey image as a density over the plane: ``dataset=picture``."""

from __future__ import annotations

import numpy as np

from flowtrain.data.image_files import load_image
from flowtrain.data.toys import Plane
from flowtrain.errors import FlowtrainError, UsageError

EXTENT = 4.0  # the longer side spans [−EXTENT, EXTENT]


class ImageDensity(Plane):
    """Points whose density is proportional to the brightness of the image at ``dataset.path`` and constant within a
    pixel. The longer side of the image spans [−4, 4].

    Args:
        invert: dark pixels are dense instead of bright ones.
    """

    native_name = "picture"
    uses_path = True

    def __init__(self, *, invert: bool = False, **keys):
        super().__init__(**keys)
        self._check_type("invert", invert, bool, "true or false")
        self.invert = bool(invert)

    def _draw(self, rows, random):
        weight = self._pixel_probabilities()
        height, width = weight.shape
        at = random.choice(weight.size, rows, p=weight.ravel())
        down, right = np.divmod(at, width)
        x, y = right + random.random(rows), down + random.random(rows)
        pixel = 2 * EXTENT / max(height, width)
        positive = weight[weight > 0]
        self._mean_log_density = float((positive * np.log(positive / pixel**2)).sum())
        return pixel * np.stack((x - width / 2, height / 2 - y), 1)

    def _pixel_probabilities(self) -> np.ndarray:
        """The probability of each pixel, (H, W)."""
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs dataset.path=FILE, an image")
        if not self.path.is_file():
            raise UsageError(f"dataset.path={self.path}: no such image")
        try:
            with open(self.path, "rb") as file:
                grey = np.asarray(load_image(file, "L")).astype(np.float64)
        except Exception as error:  # PIL raises many kinds for a damaged file
            raise FlowtrainError(f"cannot read the image {self.path}: {' '.join(str(error).split())}") from error
        grey = 255 - grey if self.invert else grey
        if not grey.any():
            raise UsageError(
                f"dataset.path={self.path}: {'white' if self.invert else 'black'} all over, so it has no density"
            )
        return grey / grey.sum()

    def _origin(self) -> str:
        best = self._mean_log_density
        return f"drawn with seed {self.split_seed} from {self.path}, whose own density gives {best:.4f} nats"
