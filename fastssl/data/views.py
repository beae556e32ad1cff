"""Views of images as joint-embedding methods train on them: crop, flip, colour, blur, solarise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl import functional as F
from fastssl.data.batch import Decoded
from fastssl.data.decode import Pixels
from fastssl.data.transforms import Box, RandomResizedCrop
from fastssl.kernels.augment_views import COLUMNS
from fastssl.kernels.common.checks import check_int, check_shape, check_tensor

# How the numbers that follow a crop's are shared out: whether to jitter, its factors and the keys
# its order is sorted by, whether to turn grey, whether to blur and how much, whether to solarise.
_COLOR_UNIFORMS = (1, 4, 4, 1, 1, 1, 1)
# Pixels that wait for their views at a time, in bytes: a batch of large pictures would fill memory.
_CHUNK_BYTES = 2**26
# The smallest part of a picture that holds the boxes of all its views, and these within it.
_Cut = tuple[Pixels, list[Box]]


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

    def box(self, region: Box, uniforms: Sequence[float]) -> Box:
        """The crop that a row of numbers chooses inside `region`."""
        return self._crop.box(region, uniforms)

    def params(self, uniforms: Tensor) -> Tensor:
        """[B, num_uniforms] -> [B, 13] float32, `params` of `augment_views`."""
        check_tensor("uniforms", uniforms, device=torch.device("cpu"))
        check_shape("uniforms", uniforms, (None, self.num_uniforms), "[B, num_uniforms]")
        crop = RandomResizedCrop.num_uniforms
        flip = uniforms[:, crop - 1 : crop] < self.flip
        if not self.has_color:
            params = uniforms.new_zeros((len(uniforms), len(COLUMNS)))
            params[:, :1] = flip
            params[:, 6:10] = torch.arange(4.0)  # any order
            return params
        jitter, factors, order, grey, blur, sigma, invert = uniforms[:, crop:].split(
            _COLOR_UNIFORMS, dim=1
        )
        sigma = self.sigma[0] + sigma * (self.sigma[1] - self.sigma[0])
        columns = (
            *(flip, jitter < self.jitter, self._factors(factors)),
            *(order.argsort(dim=1, stable=True), grey < self.grey),
            *(torch.where(blur < self.blur, sigma, 0.0), invert < self.solarize),
        )
        return torch.cat([column.float() for column in columns], dim=1)

    def __call__(
        self, pictures: Sequence[Pixels], regions: Sequence[Box], uniforms: Tensor
    ) -> Tensor:
        """B pictures, the part of each to use and [B, num_uniforms] -> uint8 [B, 3, H, W].

        A row of the result depends on the same row of the arguments only.
        """
        return make_views(decode_later([self], pictures, [uniforms], regions))[0]

    def _factors(self, uniforms: Tensor) -> Tensor:
        """[B, 4] of [0, 1) -> [B, 4], of brightness, contrast, saturation and hue."""
        strengths = (self.brightness, self.contrast, self.saturation)
        low = uniforms.new_tensor([max(0.0, 1 - s) for s in strengths] + [-self.hue])
        high = uniforms.new_tensor([1 + s for s in strengths] + [self.hue])
        return low + uniforms * (high - low)


def kernel_size(size: tuple[int, int]) -> int:
    """Side of a view's blur, in pixels."""
    return max(2 * (min(size) // 20) + 1, 3)


def see_through(
    views: Sequence[View],
    pictures: Iterable[tuple[int, Pixels, Box]],
    indices: Tensor,
    *,
    seed: int,
    epoch: int = 0,
    view: int = 0,
    keep_decoded: bool = False,
) -> tuple[list[int], tuple[Tensor, ...] | Decoded]:
    """Every view of every picture: the rows that came, and for each view uint8 [rows, 3, H, W].

    pictures: (row, picture, the part of it to use), row being a place in `indices`, some may be
        left out. Taken one at a time: a batch of pictures may not fit in memory.
    indices: [B] int64; with seed, epoch and view, what the numbers of a sample are a function of.
    keep_decoded: in place of the views, give what `make_views` makes them of.
    """
    keys = {"seed": seed, "epoch": epoch, "stream": F.STREAM_CROP}
    uniforms = [
        F.keyed_uniform(indices, one.num_uniforms, view=view * len(views) + number, **keys)
        for number, one in enumerate(views)
    ]
    params, numbers = _params(views, uniforms), _by_picture(uniforms)
    rows: list[int] = []
    waiting: list[_Cut] = []
    parts: list[tuple[Tensor, ...]] = []

    def decoded() -> Decoded:
        return _joined(views, waiting, params[:, rows[len(rows) - len(waiting) :]])

    size = 0
    for row, picture, region in pictures:
        rows.append(row)
        waiting.append(_cut(views, picture, region, numbers[row]))
        size += waiting[-1][0].size
        if size >= _CHUNK_BYTES and not keep_decoded:
            parts.append(make_views(decoded()))
            size, waiting = 0, []
    if keep_decoded:
        return rows, decoded()
    if waiting or not parts:
        parts.append(make_views(decoded()))
    return rows, parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def decode_later(
    views: Sequence[View],
    pictures: Sequence[Pixels],
    uniforms: Sequence[Tensor],  # of each view, [B, num_uniforms]
    regions: Sequence[Box] | None = None,  # None: whole pictures
) -> Decoded:
    """B pictures, and the views that their numbers choose of them: what `make_views` takes."""
    if regions is None:
        regions = [(0, 0, picture.shape[1], picture.shape[0]) for picture in pictures]
    if {len(regions), *map(len, uniforms)} != {len(pictures)}:
        raise ValueError(
            "pictures, regions and uniforms must be equally many, got "
            f"{len(pictures)}, {len(regions)} and {', '.join(str(len(u)) for u in uniforms)}"
        )
    params = _params(views, uniforms)
    rows = zip(pictures, regions, _by_picture(uniforms), strict=True)
    return _joined(views, [_cut(views, *row) for row in rows], params)


def _params(views: Sequence[View], uniforms: Sequence[Tensor]) -> Tensor:  # [V, B, 13]
    return torch.stack([view.params(draws) for view, draws in zip(views, uniforms, strict=True)])


def _by_picture(uniforms: Sequence[Tensor]) -> list[tuple[list[float], ...]]:
    """Of each picture, the numbers of each view."""
    return list(zip(*(draws.tolist() for draws in uniforms), strict=True))


def _cut(
    views: Sequence[View], picture: Pixels, region: Box, numbers: Sequence[Sequence[float]]
) -> _Cut:
    boxes = [view.box(region, draws) for view, draws in zip(views, numbers, strict=True)]
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    x, y = min(lefts), min(tops)
    part = picture[y : max(bottoms), x : max(rights)]
    # A copy lets go of the picture: of large ones, a batch may not fit in memory.
    part = part if part.size == picture.size else part.copy()
    return part, [(left - x, top - y, right - x, down - y) for left, top, right, down in boxes]


def _joined(views: Sequence[View], cuts: Sequence[_Cut], params: Tensor) -> Decoded:
    parts = [part for part, _ in cuts]
    pixels = np.concatenate([part.reshape(-1) for part in parts] or [np.empty(0, np.uint8)])
    lengths = torch.tensor([part.size for part in parts], dtype=torch.int64)
    shapes = torch.tensor([part.shape[:2] for part in parts], dtype=torch.int64)
    boxes = torch.tensor([inside for _, inside in cuts], dtype=torch.int64)
    return Decoded(
        torch.from_numpy(pixels),
        lengths.cumsum(0) - lengths,
        shapes.reshape(-1, 2),
        boxes.reshape(len(cuts), len(views), 4).transpose(0, 1).contiguous(),
        params,
        tuple(view.size for view in views),
    )


def make_views(decoded: Decoded, **options: Any) -> tuple[Tensor, ...]:
    """Every view, [B, 3, H, W], where the pixels are; all of one size in one call.

    options: of `augment_views`; without any the result is uint8.
    """
    options = options or {"dtype": torch.uint8}
    made: dict[int, Tensor] = {}
    batch = decoded.offsets.shape[0]
    for size in dict.fromkeys(decoded.sizes):
        here = [number for number, other in enumerate(decoded.sizes) if other == size]
        out = F.augment_views(
            *(decoded.pixels, decoded.offsets, decoded.shapes),
            torch.arange(batch, device=decoded.pixels.device).repeat(len(here)),
            torch.cat([decoded.boxes[number] for number in here]),
            torch.cat([decoded.params[number] for number in here]),
            size=size,
            kernel_size=kernel_size(size),
            **options,
        )
        made.update(zip(here, out.unflatten(0, (len(here), batch)).unbind(), strict=True))
    return tuple(made[number] for number in range(len(made)))
