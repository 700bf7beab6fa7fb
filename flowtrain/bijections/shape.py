"""Rearrangements of an event into another shape."""

from __future__ import annotations

from torch import Tensor

from flowtrain.bijections.bijection import Bijection, size, zero_log_det


def pixels_to_channels(x: Tensor, n: int = 2) -> Tensor:
    """(B, C, H, W) -> (B, n²·C, H/n, W/n)."""
    # not F.pixel_unshuffle: it loses the channels of an empty batch
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // n, n, width // n, n).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, n * n * channels, height // n, width // n)


def channels_to_pixels(x: Tensor, n: int = 2) -> Tensor:
    """(B, n²·C, H, W) -> (B, C, n·H, n·W)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels // n**2, n, n, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // n**2, n * height, n * width)


class Squeeze(Bijection):
    """2×2 pixels become 4 channels: (C, H, W) -> (4C, H/2, W/2) (Dinh et al. 2017, section 3.6).

    Pixel (row, column) of each 2×2 block of channel c becomes channel 4c + 2·row + column.

    Args:
        shape: (C, H, W).
        size: of the sides of a block, in pixels; size² channels in place of 4.
        context_shape: not used.

    Raises:
        ValueError: not an image, or sides that are no multiples of ``size``.

    >>> import torch
    >>> Squeeze((3, 8, 8))(torch.randn(5, 3, 8, 8))[0].shape
    torch.Size([5, 12, 4, 4])
    """

    reversible = True

    def __init__(self, shape, size: int = 2, context_shape=None):
        super().__init__(shape, context_shape)
        if len(self.shape) != 3:
            raise ValueError(f"a squeeze needs images (channels, height, width), not {list(self.shape)}")
        channels, height, width = self.shape
        if size < 1 or height % size or width % size:
            parts = "halved; fewer levels are needed" if size == 2 else f"divided into blocks of {size}×{size}"
            raise ValueError(f"sides of {height}×{width} cannot be {parts}")
        self.size = size
        self.out_shape = (size**2 * channels, height // size, width // size)

    def forward(self, x, context=None):
        return pixels_to_channels(x, self.size), zero_log_det(x)

    def inverse(self, z, context=None):
        return channels_to_pixels(z, self.size), zero_log_det(z)


class Unsqueeze(Bijection):
    """4 channels become 2×2 pixels, (4C, H, W) -> (C, 2H, 2W): the inverse of :class:`Squeeze`.

    Raises:
        ValueError: a number of channels that is no multiple of 4.

    >>> import torch
    >>> Unsqueeze((12, 4, 4))(torch.randn(5, 12, 4, 4))[0].shape
    torch.Size([5, 3, 8, 8])
    """

    reversible = True

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        channels, odd = divmod(self.shape[0], 4)
        if odd:
            raise ValueError(f"{self.shape[0]} channels are not those of a squeezed image")
        self.out_shape = (channels, 2 * self.shape[1], 2 * self.shape[2])

    def forward(self, x, context=None):
        return channels_to_pixels(x), zero_log_det(x)

    def inverse(self, z, context=None):
        return pixels_to_channels(z), zero_log_det(z)


class Flatten(Bijection):
    """Any shape becomes a vector, (D,).

    >>> import torch
    >>> Flatten((3, 8, 8))(torch.randn(5, 3, 8, 8))[0].shape
    torch.Size([5, 192])
    """

    reversible = True

    def __init__(self, shape, context_shape=None):
        super().__init__(shape, context_shape)
        self.out_shape = (size(self.shape),)

    def forward(self, x, context=None):
        return x.flatten(1), zero_log_det(x)

    def inverse(self, z, context=None):
        return z.unflatten(1, self.shape), zero_log_det(z)


class Patches(Bijection):
    """An image as a row of tokens, (C, H, W) -> (H·W/size², C·size²): its patches, row by row (Zhai et al. 2024,
    section 2.2).

    Args:
        shape: (C, H, W).
        size: of the sides of a patch, in pixels.
        context_shape: not used.

    Raises:
        ValueError: not an image, or sides that are no multiples of ``size``.

    >>> import torch
    >>> Patches((3, 8, 6), size=2)(torch.randn(5, 3, 8, 6))[0].shape
    torch.Size([5, 12, 12])
    """

    reversible = True

    def __init__(self, shape, size: int, context_shape=None):
        super().__init__(shape, context_shape)
        if len(self.shape) != 3:
            raise ValueError(f"patches are of images (channels, height, width), not of {list(self.shape)}")
        channels, height, width = self.shape
        if size < 1 or height % size or width % size:
            raise ValueError(f"patch={size} must divide the sides of {height}×{width}")
        self.size = size
        self.out_shape = (height * width // size**2, channels * size**2)

    def forward(self, x, context=None):
        channels, height, width = self.shape
        x = x.reshape(-1, channels, height // self.size, self.size, width // self.size, self.size)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, *self.out_shape), zero_log_det(x)

    def inverse(self, z, context=None):
        channels, height, width = self.shape
        z = z.reshape(-1, height // self.size, width // self.size, channels, self.size, self.size)
        return z.permute(0, 3, 1, 4, 2, 5).reshape(-1, *self.shape), zero_log_det(z)
