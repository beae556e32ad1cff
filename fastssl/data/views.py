"""Views of images as joint-embedding methods train on them: crop, flip, colour, blur, solarise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from fastssl import functional as F
from fastssl.data.color import apply_to_rows, color_jitter, gaussian_blur, solarize, to_grey
from fastssl.data.transforms import Box, RandomResizedCrop
from fastssl.kernels.common.checks import check_int, check_shape, check_tensor

# How the numbers that follow a crop's are shared out: whether to jitter, its factors and the keys
# its order is sorted by, whether to turn grey, whether to blur and how much, whether to solarise.
_COLOR_UNIFORMS = (1, 4, 4, 1, 1, 1, 1)
# Floats that are coloured at a time, 8 MB.
_CHUNK = 2**21


@dataclass(frozen=True)
class View:
    """A random resized crop, perhaps mirrored, then perhaps each of: colour jitter, grey, Gaussian
    blur, solarisation; in this order.

    size: (height, width) of the result.
    scale, ratio, flip: as for RandomResizedCrop, which makes the crop.
    jitter, grey, blur, solarize: probabilities.
    brightness, contrast, saturation: a jitter's factors are in [max(0, 1 - this), 1 + this].
    hue: a jitter turns hues by at most this, in turns, at most 0.5.
    sigma: smallest and largest standard deviation of the blur, in pixels.
    number: how many such views a method takes of an image.

    The jitter is torchvision's ColorJitter, the blur its GaussianBlur with a kernel of a tenth of
    the smaller side as in SimCLR (arXiv 2002.05709): 2 * (side // 20) + 1, at least 3, which is 23
    for 224, 9 for 96 and 3 for 32. Solarisation inverts what is at least half of the range.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    number: int = 1

    def __post_init__(self) -> None:
        # Made for its checks of size, scale, ratio and flip.
        _ = self._crop
        for name in ("jitter", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {self.hue}")
        if len(self.sigma) != 2 or not 0 < self.sigma[0] <= self.sigma[1] < math.inf:
            raise ValueError(f"sigma must be 0 < smallest <= largest, got {self.sigma}")
        check_int("number", self.number, 1)

    @cached_property
    def _crop(self) -> RandomResizedCrop:
        return RandomResizedCrop(self.size, self.scale, self.ratio, self.flip)

    @property
    def has_color(self) -> bool:
        """Whether anything may happen after the crop."""
        return max(self.jitter, self.grey, self.blur, self.solarize) > 0

    @property
    def num_uniforms(self) -> int:
        """Numbers of [0, 1) that a view uses up; the first of them are the crop's."""
        color = sum(_COLOR_UNIFORMS) if self.has_color else 0
        return RandomResizedCrop.num_uniforms + color

    @property
    def kernel_size(self) -> int:
        """Side of the blur's kernel, in pixels."""
        return max(2 * (min(self.size) // 20) + 1, 3)

    def __call__(
        self, images: Sequence[Image.Image], regions: Sequence[Box], uniforms: Tensor
    ) -> Tensor:
        """B RGB images, the part of each to use and [B, num_uniforms] -> uint8 [B, 3, H, W].

        A row of the result depends on the same row of the arguments only.
        """
        check_tensor("uniforms", uniforms, device=torch.device("cpu"))
        check_shape("uniforms", uniforms, (len(images), self.num_uniforms), "[B, num_uniforms]")
        if not images or len(regions) != len(images):
            raise ValueError(
                "images and regions must be equally many and at least one, got "
                f"{len(images)} and {len(regions)}"
            )
        rows = zip(images, regions, uniforms.tolist(), strict=True)
        return self.color(torch.stack([self.crop(*row) for row in rows]), uniforms)

    def crop(self, image: Image.Image, region: Box, uniforms: Sequence[float]) -> Tensor:
        """The crop of one image by its row of numbers: uint8 [3, H, W]."""
        return self._crop(image, region, uniforms)

    def color(self, crops: Tensor, uniforms: Tensor) -> Tensor:
        """What comes after the crops, uint8 [B, 3, H, W], by their rows [B, num_uniforms]."""
        if not self.has_color:
            return crops
        # The floats of a large batch would leave the cache between one operation and the next.
        rows = max(_CHUNK // crops[0].numel(), 1)
        uniforms = uniforms[:, RandomResizedCrop.num_uniforms :]
        chunks = zip(crops.split(rows), uniforms.split(rows), strict=True)
        return torch.cat([self._color(*chunk) for chunk in chunks])

    def _color(self, crops: Tensor, uniforms: Tensor) -> Tensor:
        jitter, factors, order, grey, blur, sigma, invert = uniforms.split(_COLOR_UNIFORMS, dim=1)
        images = crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        apply_to_rows(
            images,
            jitter[:, 0] < self.jitter,
            color_jitter,
            self._factors(factors),
            order.argsort(dim=1, stable=True),
        )
        apply_to_rows(images, grey[:, 0] < self.grey, to_grey)
        sigma = self.sigma[0] + sigma[:, 0] * (self.sigma[1] - self.sigma[0])
        apply_to_rows(
            images,
            blur[:, 0] < self.blur,
            lambda rows, sigma: gaussian_blur(rows, sigma, self.kernel_size),
            sigma,
        )
        apply_to_rows(images, invert[:, 0] < self.solarize, solarize)
        return images.mul_(255).round_().to(torch.uint8)

    def _factors(self, uniforms: Tensor) -> Tensor:
        """[B, 4] of [0, 1) -> [B, 4], of brightness, contrast, saturation and hue."""
        strengths = (self.brightness, self.contrast, self.saturation)
        low = uniforms.new_tensor([max(0.0, 1 - s) for s in strengths] + [-self.hue])
        high = uniforms.new_tensor([1 + s for s in strengths] + [self.hue])
        return low + uniforms * (high - low)


def see_through(
    views: Sequence[View],
    images: Iterable[tuple[int, Image.Image, Box]],
    indices: Tensor,
    *,
    seed: int,
    epoch: int = 0,
    view: int = 0,
) -> tuple[list[int], tuple[Tensor, ...]]:
    """Every view of every image: the rows that came, and for each view uint8 [rows, 3, H, W].

    views: in place of a `View` whatever has its size, num_uniforms, crop and color.
    images: (row, image, the part of it to use), row being a place in `indices`, some may be left
        out. Taken one at a time: a batch of pictures may not fit in memory.
    indices: [B] int64; with seed, epoch and view, what the numbers of a sample are a function of.
    """
    uniforms = [
        F.keyed_uniform(
            indices,
            one.num_uniforms,
            seed=seed,
            epoch=epoch,
            view=view * len(views) + number,
            stream=F.STREAM_CROP,
        )
        for number, one in enumerate(views)
    ]
    numbers = [draws.tolist() for draws in uniforms]
    rows: list[int] = []
    crops: list[list[Tensor]] = [[] for _ in views]
    for row, image, region in images:
        rows.append(row)
        for one, draws, done in zip(views, numbers, crops, strict=True):
            done.append(one.crop(image, region, draws[row]))
    return rows, tuple(
        one.color(torch.stack(done), draws[rows])
        if rows
        else torch.empty(0, 3, *one.size, dtype=torch.uint8)
        for one, done, draws in zip(views, crops, uniforms, strict=True)
    )
