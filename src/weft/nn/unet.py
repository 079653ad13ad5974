"""A U-Net: an encoder that halves the image, a decoder that doubles it back, and skips that join equal resolutions.

Shape letters: N batch, C channels, H height, W width.

Source: Ronneberger, Fischer and Brox, arXiv:1505.04597, with two changes common since: padded convolutions (output and
input have one size) and group norm in place of none, so that the batch may be cut anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UNet", "UNetOptions"]


@dataclass(frozen=True)
class UNetOptions:
    """Sizes of a `UNet`.

    Attributes:
        channels: of the input image.
        classes: output channels, one logit per pixel and class.
        widths: channels at each resolution, finest first; every step halves height and width, which must be divisible
            by 2^(len(widths) - 1).
        groups: groups of each norm; must divide every width.
    """

    channels: int = 3
    classes: int = 2
    widths: tuple[int, ...] = (16, 32, 64)
    groups: int = 4

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.channels < 1 or self.classes < 1:
            raise ValueError(f"UNetOptions: channels, classes and every width must be at least 1, got {self}")
        if self.groups < 1 or any(width % self.groups for width in self.widths):
            raise ValueError(f"UNetOptions: groups must divide every width, got {self.groups} and {self.widths}")


class DoubleConv(nn.Module):
    """Twice convolution, group norm, SiLU: (N, C, H, W) to (N, C', H, W)."""

    def __init__(self, before: int, after: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = F.silu(self.norm1(self.conv1(x_NCHW)))
        return F.silu(self.norm2(self.conv2(x_NCHW)))


class UNet(nn.Module):
    """Per-pixel classification."""

    def __init__(self, options: UNetOptions | None = None):
        super().__init__()
        self.options = options = options or UNetOptions()
        widths = options.widths
        before = (options.channels, *widths[:-1])
        self.down = nn.ModuleList(DoubleConv(a, b, options.groups) for a, b in zip(before, widths, strict=True))
        self.up = nn.ModuleList(
            DoubleConv(deep + fine, fine, options.groups)
            for deep, fine in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], options.classes, 1)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (N, classes, H, W) for `images` (N, C, H, W), or the mean cross-entropy to `targets` (N, H, W).

        Raises:
            ValueError: height or width cannot be halved `len(widths) - 1` times.
        """
        step = 2 ** (len(self.options.widths) - 1)
        if images.shape[-1] % step or images.shape[-2] % step:
            raise ValueError(f"UNet: height and width must be multiples of {step}, got {tuple(images.shape[-2:])}")
        skips, x_NCHW = [], images
        for level, block in enumerate(self.down):
            x_NCHW = block(x_NCHW if level == 0 else F.max_pool2d(x_NCHW, 2))
            skips.append(x_NCHW)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x_NCHW = block(torch.cat([F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"), skip], dim=1))
        logits = self.head(x_NCHW)
        return logits if targets is None else F.cross_entropy(logits, targets)
