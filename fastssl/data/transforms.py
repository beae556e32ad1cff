"""Random resized crops whose parameters are given, never drawn from a global generator."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastssl.data.decode import Pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crop a part of an image, resize it (bicubic, antialiased), perhaps mirror it.

    size: (height, width) of the result.
    scale: smallest and largest area of the crop, as a share of the area it is taken from.
    ratio: smallest and largest width / height of the crop, drawn on a logarithmic scale.
    flip: probability of a mirror image.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    # Numbers of [0, 1) that one crop uses up.
    num_uniforms = 5

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be two positive numbers, got {self.size}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < smallest <= largest <= 1, got {self.scale}")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < smallest <= largest, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")

    def box(self, region: Box, uniforms: Sequence[float]) -> Box:
        """The crop that the first four numbers choose inside `region`, in whole pixels.

        A crop wider or higher than the region is shortened to it (no rejection and no second
        draw, so that a crop is a function of its numbers).
        """
        left, top, right, bottom = region
        width, height = right - left, bottom - top
        area = width * height * (self.scale[0] + uniforms[0] * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = math.exp(low + uniforms[1] * (high - low))
        w = min(max(round(math.sqrt(area * ratio)), 1), width)
        h = min(max(round(math.sqrt(area / ratio)), 1), height)
        x = left + min(int(uniforms[2] * (width - w + 1)), width - w)
        y = top + min(int(uniforms[3] * (height - h + 1)), height - h)
        return x, y, x + w, y + h

    def __call__(self, pixels: Pixels, region: Box, uniforms: Sequence[float]) -> Tensor:
        """[h, w, 3] -> uint8 [3, H, W]. Pixels outside of `region` do not enter the result."""
        left, top, right, bottom = self.box(region, uniforms)
        # Cut first, and no resize(box=), whose filter reaches beyond the box.
        crop = Image.fromarray(pixels[top:bottom, left:right])
        crop = crop.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC)
        if uniforms[4] < self.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


def _in_bytes(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """[2, C] float32: both times 255."""
    return (torch.tensor([mean, std], dtype=torch.float32) * 255).to(device)


# The host waits for a copy to a GPU.
_kept_in_bytes = functools.lru_cache(maxsize=64)(_in_bytes)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 3, ...] -> float32, (x / 255 - mean) / std per channel."""
    shape = (1, len(mean), *[1] * (images.dim() - 2))
    in_bytes = _kept_in_bytes if images.is_cuda else _in_bytes
    shift, spread = (x.reshape(shape) for x in in_bytes(tuple(mean), tuple(std), images.device))
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub(shift).div_(spread)


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of `normalize`, rounded and clipped: float [B, 3, H, W] -> uint8."""
    shape = (1, len(mean), 1, 1)
    shift = torch.tensor(mean, device=images.device).reshape(shape)
    spread = torch.tensor(std, device=images.device).reshape(shape)
    return ((images.float() * spread + shift) * 255).round_().clamp_(0, 255).to(torch.uint8)
