"""The digits that scikit-learn ships: 1,797 real 8×8 images of 17 grey levels."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.images import ArrayImages


class Digits(ArrayImages):
    """Handwritten digits: 1,259 for train, 179 for val, 359 for test."""

    native_name = "digits"
    native_size, native_channels, native_levels = 8, 1, 17
    own_splits = ()
    uses_root = False
    classes = 10
    default_val, default_test = 0.1, 0.2

    def _load(self, part: str) -> tuple[Tensor, Tensor, str]:
        # reads the file directly: importing scikit-learn would take a quarter of the time to the first training step
        (package,) = find_spec("sklearn").submodule_search_locations
        table = np.loadtxt(Path(package) / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.uint8)
        images = torch.from_numpy(table[:, :64]).view(-1, 1, 8, 8)
        return images, torch.from_numpy(table[:, 64].astype(np.int64)), "from scikit-learn"
