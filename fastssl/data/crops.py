"""Datasets of crops: batches are a function of (seed, epoch, sample, view) and the files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastssl import functional as F
from fastssl.data.batch import Batch
from fastssl.data.decode import Pixels
from fastssl.data.pictures import NewlySkipped, Pictures
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Box, RandomResizedCrop
from fastssl.data.views import View, see_through


@dataclass(frozen=True)
class Request:
    """The samples of one micro-batch, as a sampler hands it to a worker.

    keep_decoded: the views are to be made by the loader, on its device.
    """

    indices: Tensor  # [B] int64
    epoch: int = 0
    view: int = 0
    step: int = 0
    keep_decoded: bool = False


def whole(picture: Pixels) -> Box:
    return 0, 0, picture.shape[1], picture.shape[0]


def left_half(picture: Pixels) -> Box:
    """The half of a picture for training."""
    height, width, _ = picture.shape
    return 0, 0, max(width // 2, 1), height


def right_half(picture: Pixels) -> Box:
    """The held-out half. Disjoint from the left one unless the picture is one pixel wide.

    Left and right, because what a photograph shows changes less from side to side than from sky
    to ground.
    """
    height, width, _ = picture.shape
    return min(width // 2, width - 1), 0, width, height


class PretrainingCrops(Dataset[Batch]):
    """Random views of the pictures of `files`, unlabelled.

    Sample i is of picture i mod len(files); any i >= 0 is valid, `len` is the number that makes up
    an epoch: `crops_per_image` times `repeats` of each picture, of which the repeats come in the
    same global batch. Of the pictures in `held_out` only the left half is used. With `region`, a
    smallest and a largest share of the area, a sample is a fixed part of its picture, the same in
    every epoch and view: few large pictures then make many samples that differ.
    """

    def __init__(
        self,
        files: Pictures,
        views: Sequence[View],
        *,
        seed: int = 0,
        crops_per_image: int = 1,
        repeats: int = 1,
        region: tuple[float, float] | None = None,
        held_out: Collection[int] = (),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.files = files
        self.views = tuple(view for view in views for _ in range(view.number))
        self.seed = seed
        self.region = None if region is None else RandomResizedCrop((1, 1), region)
        self.crops_per_image = crops_per_image
        self.repeats = repeats
        self.held_out = frozenset(held_out)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._new = NewlySkipped(files)

    def __len__(self) -> int:
        return len(self.files) * self.crops_per_image * self.repeats

    def __getitem__(self, request: Request) -> Batch:
        """The views of the samples that the request names, each uint8 [B, 3, H, W]; or what they
        are to be made of."""
        _, seen = see_through(
            self.views,
            self._pictures(request.indices),
            request.indices,
            seed=self.seed,
            epoch=request.epoch,
            view=request.view,
            keep_decoded=request.keep_decoded,
        )
        return Batch(
            () if request.keep_decoded else seen,
            request.indices,
            request.epoch,
            request.view,
            request.step,
            skipped=self._new(),
            decoded=seen if request.keep_decoded else None,
        )

    def _pictures(self, indices: Tensor) -> Iterator[tuple[int, Pixels, Box]]:
        """(row, picture, the part of it that the sample is)."""
        if self.region is not None:
            regions = F.keyed_uniform(
                indices, self.region.num_uniforms, seed=self.seed, stream=F.STREAM_REGION
            ).tolist()
        for row, index in enumerate(indices.tolist()):
            position, picture = self.files.read_or_next(index % len(self.files))
            box = (left_half if position in self.held_out else whole)(picture)
            yield row, picture, box if self.region is None else self.region.box(box, regions[row])

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{len(self.files)} images in {self.files.root}, {len(self)} samples an epoch, "
            f"{len(self.held_out)} images with a held-out half"
        )


class EvaluationCrops(Dataset[Batch]):
    """A fixed set of labelled crops of one half of some pictures; the label is which picture.

    Sample i is crop i mod crops_per_image of picture positions[i // crops_per_image]. The crops
    do not depend on the run's seed, so that runs are comparable.
    """

    def __init__(
        self,
        files: Pictures,
        crop: RandomResizedCrop,
        positions: Sequence[int],
        *,
        held_out: bool,
        crops_per_image: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.files = files
        self.crop = crop
        self.positions = tuple(positions)
        self.held_out = held_out
        self.crops_per_image = crops_per_image
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __len__(self) -> int:
        return len(self.positions) * self.crops_per_image

    def __getitem__(self, request: Request) -> Batch:
        """The crops that the request names, as uint8 [B, 3, H, W], with their labels."""
        uniforms = F.keyed_uniform(
            request.indices,
            self.crop.num_uniforms,
            seed=0,
            view=int(self.held_out),
            stream=F.STREAM_EVAL,
        ).tolist()
        labels = request.indices // self.crops_per_image
        crops = []
        for label, numbers in zip(labels.tolist(), uniforms, strict=True):
            # A file that was readable when the run began may be gone by now.
            _, picture = self.files.read_or_next(self.positions[label])
            region = (right_half if self.held_out else left_half)(picture)
            crops.append(self.crop(picture, region, numbers))
        return Batch((torch.stack(crops),), request.indices, labels=labels)
