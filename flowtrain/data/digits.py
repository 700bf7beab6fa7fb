"""scikit-learn's digits: 1,797 real 8×8 pictures of 17 grey levels, in the package that they come with."""

import numpy as np
import torch
from torch import Tensor

from flowtrain.data.base import ArrayImages


class Digits(ArrayImages):
    """Handwritten digits: 1,259 for train, 179 for val, 359 for test."""

    native_name = "digits"
    native_size, native_channels, native_levels = 8, 1, 17
    own_splits = ()
    classes = 10
    default_val, default_test = 0.1, 0.2

    def _load(self, part: str) -> tuple[Tensor, Tensor, str]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pictures = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
        return pictures, torch.from_numpy(digits.target), "held in scikit-learn"
