"""A residual network for small images (32 x 32 and the like): 3 x 3 stem, stages of basic blocks, global average.

Shape letters: N batch, C channels, H height, W width.

Source: He et al., "Deep residual learning for image recognition", arXiv:1512.03385, section 4.2 (the CIFAR-10 networks; ours
uses a 1 x 1 projection on the shortcut where the shape changes, their option B). Batch norm in training uses the statistics
of the whole batch, so weft splits the batch only if those are synchronised.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet", "ResNetOptions"]


@dataclass(frozen=True)
class ResNetOptions:
    """Sizes of a `ResNet`: input channels, classes, and per stage its channels and number of blocks.

    The first stage keeps the resolution, each later one halves it.
    """

    channels: int = 3
    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (3, 3, 3)

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.depths) or min(*self.widths, *self.depths, 1) < 1:
            raise ValueError(
                f"ResNetOptions: widths and depths need one entry >= 1 per stage, got {self.widths} and {self.depths}"
            )
        if self.channels < 1 or self.classes < 2:
            raise ValueError(
                f"ResNetOptions: needs channels >= 1 and classes >= 2, got {self.channels} and {self.classes}"
            )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x_NCHW)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x_NCHW))


class ResNet(nn.Module):
    """Residual network with batch norm for image classification."""

    def __init__(self, options: ResNetOptions | None = None):
        super().__init__()
        self.options = options = options or ResNetOptions()
        width = options.widths[0]
        self.stem = nn.Conv2d(options.channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        for stage, (after, depth) in enumerate(zip(options.widths, options.depths, strict=True)):
            for block in range(depth):
                blocks.append(BasicBlock(width, after, stride=2 if stage and not block else 1))
                width = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, options.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (N, classes) for `images` (N, C, H, W), or the mean cross-entropy to class numbers `targets` (N,)."""
        x_NCHW = self.blocks(F.relu(self.norm(self.stem(images))))
        logits = self.head(x_NCHW.mean(dim=(2, 3)))
        return logits if targets is None else F.cross_entropy(logits, targets)
