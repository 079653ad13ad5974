"""Classification of small images.

    shapes     drawn on the spot: eight kinds of figure at random places, sizes and colours, with noise (not real data)
    cifar10    the 4,000 lossless images of CIFAR-10 in `$WEFT_DATA/cifar10`, 32 x 32 in colour, ten classes
    usps       handwritten digits in `$WEFT_DATA/usps`, 16 x 16 in grey, ten classes
    FILE.npz   any arrays x (N, H, W, C) or (N, H, W) of uint8 and y (N,) of class numbers

`$WEFT_DATA` is a folder with those files; without it the default is `shapes`, and the task's name says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weft.nn import ResNet, ResNetOptions
from weft.tasks.task import Split, Task, accuracy

__all__ = ["Images", "drawn_shapes", "image_batches", "image_classification", "load_images"]

HELD_OUT = 0.125  # where the source has no test part of its own: the last eighth
SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "cross", "stripes")


@dataclass(frozen=True, eq=False)
class Images:
    """Images x (N, C, H, W) of uint8 and labels y (N,) of int64, training and test part."""

    name: str
    classes: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def image_classification(
    data: str | Path | None = None,
    *,
    widths: tuple[int, ...] = (16, 32, 64),
    depths: tuple[int, ...] = (1, 1, 1),
    batch_size: int = 64,
    seed: int = 0,
) -> Task:
    """Say what an image shows. Batches are (images, targets): (N, C, H, W) of float32, mean about 0, and (N,) of int64.

    Args:
        data: "shapes", "cifar10", "usps" or a .npz file; default cifar10 where `$WEFT_DATA` has it, else shapes.
        widths, depths: channels and blocks of each stage of the residual network.
    Raises:
        ValueError: unknown or unreadable data.
    """
    images = load_images(_default() if data is None else data)
    options = ResNetOptions(images.train[0].shape[1], images.classes, tuple(widths), tuple(depths))
    stream = partial(image_batches, images)
    return Task(
        f"image-classification/{images.name}", partial(ResNet, options), stream, None, accuracy, batch_size, 0, seed
    )


def _default() -> str:
    folder = os.environ.get("WEFT_DATA")
    return "cifar10" if folder and (Path(folder) / "cifar10" / "lossless_first4000.npz").is_file() else "shapes"


@lru_cache(maxsize=4)
def load_images(data: str | Path) -> Images:
    """The images called `data` (see the module's header)."""
    if str(data) == "shapes":
        return Images("drawn-shapes", len(SHAPES), drawn_shapes(8192, seed=0), drawn_shapes(1024, seed=1))
    if str(data) == "cifar10":
        arrays = _read(_folder() / "cifar10" / "lossless_first4000.npz")
        return Images("cifar10-4000", 10, *_cut(arrays["x"], arrays["y"]))
    if str(data) == "usps":
        arrays = _read(_folder() / "usps" / "usps.npz")
        parts = [
            (_as_images((arrays[f"x_{part}"].reshape(-1, 16, 16) * 255).astype(np.uint8)), _labels(arrays[f"y_{part}"]))
            for part in ("train", "test")
        ]
        return Images("usps", 10, *parts)
    arrays = _read(Path(data))
    if "x" not in arrays or "y" not in arrays or len(arrays["x"]) != len(arrays["y"]) or arrays["x"].ndim not in (3, 4):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"{data} must hold x (N, H, W, C) or (N, H, W) and y (N,), got {shapes}")
    return Images(Path(data).name, int(arrays["y"].max()) + 1, *_cut(arrays["x"], arrays["y"]))


def _folder() -> Path:
    folder = os.environ.get("WEFT_DATA")
    if not folder:
        raise ValueError("set WEFT_DATA to the folder that holds the data sets, or use data='shapes'")
    return Path(folder)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot read images from {path}: {error}; known names are shapes, cifar10, usps") from error


def _as_images(x: np.ndarray) -> Tensor:
    x = x[..., None] if x.ndim == 3 else x
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _labels(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y.astype(np.int64))


def _cut(x: np.ndarray, y: np.ndarray) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    images, labels = _as_images(x), _labels(y)
    cut = len(images) - max(1, int(len(images) * HELD_OUT))
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def image_batches(images: Images, split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training: every image once per pass, in an order of its own each pass, whole batches only. Test: once, in order."""
    x, y = images.train if split == "train" else images.test
    if split == "test":
        for start in range(0, len(x), batch_size):
            yield _scaled(x[start : start + batch_size]), y[start : start + batch_size]
        return
    if batch_size > len(x):
        raise ValueError(f"a batch of {batch_size} is larger than the {len(x)} training images of {images.name}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield _scaled(x[chosen]), y[chosen]


def _scaled(x: Tensor) -> Tensor:
    return x.float().div_(127.5).sub_(1)


def drawn_shapes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """`count` labelled drawings (count, 3, size, size) of uint8: one figure each, of the kinds in `SHAPES`, equally often.

    Place, size, colours and noise are random; they follow the seed alone.
    """
    random = np.random.default_rng(seed)
    labels = random.permutation(count) % len(SHAPES)
    grid = np.arange(size, dtype=np.float32) + 0.5
    radius = random.uniform(0.18, 0.38, (count, 1, 1)) * size
    centre_y, centre_x = (random.uniform(0.4, 0.6, (2, count, 1, 1)) * size).astype(np.float32)
    y, x = (grid[None, :, None] - centre_y) / radius, (grid[None, None, :] - centre_x) / radius
    far, wide = np.hypot(x, y), np.maximum(abs(x), abs(y))
    figures = np.stack(
        [
            far < 1,  # disc
            (far < 1) & (far > 0.55),  # ring
            wide < 0.9,  # square
            (wide < 0.9) & (wide > 0.5),  # frame
            (y < 0.8) & (y > 2 * abs(x) - 1),  # triangle
            (wide < 1) & (np.minimum(abs(x), abs(y)) < 0.3),  # plus
            (wide < 1) & (np.minimum(abs(x - y), abs(x + y)) < 0.4),  # cross
            (wide < 1) & (np.floor(y * 2.5) % 2 == 0),  # stripes
        ]
    )
    figure = figures[labels, np.arange(count)][:, None]
    ink, paper = random.uniform(0.55, 1, (count, 3, 1, 1)), random.uniform(0, 0.45, (count, 3, 1, 1))
    swap = random.random((count, 1, 1, 1)) < 0.5  # light on dark or dark on light
    image = np.where(figure ^ swap, ink, paper) + random.normal(0, 0.08, (count, 3, size, size))
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)), torch.from_numpy(labels.astype(np.int64))
