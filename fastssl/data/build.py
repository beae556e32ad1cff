"""From the `data` key of a configuration to datasets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastssl.data.crops import EvaluationCrops, PretrainingCrops
from fastssl.data.decode import BrokenImage
from fastssl.data.digits import Digits
from fastssl.data.fetch import is_url
from fastssl.data.folder import ImageFiles, find_images
from fastssl.data.hub import PREFIX, HubImages
from fastssl.data.labelled import build_labelled
from fastssl.data.packed import PackedImages, is_pack
from fastssl.data.photos import list_photos
from fastssl.data.pictures import Pictures
from fastssl.data.shards import ShardImages, find_shards
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomResizedCrop
from fastssl.data.views import View

# The photographs are few, so that an epoch takes many crops of each.
_CROPS_PER_PHOTO = 64


def build_datasets(
    data: str,
    *,
    image_size: int | tuple[int, int],
    views: Sequence[View] | None = None,
    seed: int = 0,
    region: tuple[float, float] | None = None,
    crops_per_image: int | None = None,
    repeats: int = 1,
    shard_window: int = 0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    eval_scale: tuple[float, float] = (0.2, 0.5),
    eval_crops: int = 32,
    max_eval_images: int = 200,
) -> tuple[PretrainingCrops, tuple[EvaluationCrops, EvaluationCrops] | None]:
    """Datasets for pretraining and for its evaluation, of whatever `data` names.

    Evaluation asks, of a crop from the right half of a picture, which picture it is from, having
    seen crops from the left halves. It therefore needs no labels, and pretraining sees only the
    left half of the pictures that take part: at most `max_eval_images`, evenly spaced.

    Args:
        data: "photos"; a folder of images at any depth; tar shards, see `ShardImages`: a folder of
            nothing else, a path or a URL, in which {000..099} and {a,b} are expanded; what
            `fastssl-data pack` wrote; hf:..., see
            `HubImages`; or "digits": scikit-learn's, but for those that `build_labelled` holds out;
            without evaluation datasets, since halves of digits tell nothing.
        image_size: side, or (height, width), of a crop for evaluation in pixels.
        views: what pretraining sees of a sample. None: one crop of image_size.
        seed: of the views.
        region: see `PretrainingCrops`.
        crops_per_image: samples of one picture in an epoch. None: 64 of a photograph, 1 of a
            file in a folder.
        repeats: crops of one picture that are in the same global batch; an epoch has so many times
            more samples (repeated augmentation, arXiv 1901.09335).
        shard_window: shards that an epoch reads from at a time, 0 for all.
        mean, std: of the RGB channels, for normalisation, where white is 1.
        eval_scale: as `scale`, for the square crops of evaluation.
        eval_crops: crops of each half in evaluation.
        max_eval_images: pictures in evaluation. 0: none, and pretraining sees all whole.

    Returns:
        The pretraining dataset; the evaluation datasets to learn from and to test on, or None
        where fewer than two pictures can take part.

    Raises:
        ValueError: `data` is missing, a file, without images or without a readable one; its shards
            or its dataset cannot be used.
        ImportError: the photographs are not installed, or the package that reads `data`.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    views = (View(size),) if views is None else tuple(views)
    eval_crop = RandomResizedCrop(size, tuple(eval_scale), (1.0, 1.0), 0.0)
    norm = {"mean": mean, "std": std}
    if data == "digits":
        learn, _ = build_labelled(data, image_size=size, seed=seed)
        digits = Digits(learn.positions.tolist())
        crops = {"crops_per_image": crops_per_image or 1, "repeats": repeats}
        return PretrainingCrops(digits, views, seed=seed, **crops, **norm), None
    # The smallest crop of half a picture should still have the pixels that it is resized to.
    smallest = 1.0 if region is None else region[0]
    shortest_side = max(
        math.ceil(2 * max(size) / math.sqrt(share))
        for size, share in [
            (size, eval_scale[0]),
            *((view.size, smallest * view.scale[0]) for view in views),
        ]
    )
    files = open_pictures(data, shortest_side, shard_window)
    files.read_or_next(0)

    positions = _evaluated(files, max_eval_images)
    if crops_per_image is None:
        crops_per_image = _CROPS_PER_PHOTO if data == "photos" else 1
    train = PretrainingCrops(
        files,
        views,
        seed=seed,
        crops_per_image=crops_per_image,
        repeats=repeats,
        region=region,
        held_out=positions,
        **norm,
    )
    if not positions:
        return train, None
    learn, test = (
        EvaluationCrops(
            files, eval_crop, positions, held_out=held_out, crops_per_image=eval_crops, **norm
        )
        for held_out in (False, True)
    )
    return train, (learn, test)


def open_pictures(data: str, shortest_side: int | None = None, shard_window: int = 0) -> Pictures:
    """The pictures that `data` names, for which see `build_datasets`."""
    shards = None
    if data == "photos":
        return ImageFiles(*list_photos(), shortest_side)
    if is_pack(data):
        return PackedImages(data, shard_window)
    if not data.startswith(PREFIX) or is_url(data):
        shards = find_shards(data)
    if shards is not None:
        return ShardImages(shards, data, shortest_side, shard_window)
    if shard_window:
        raise ValueError(
            f"loader.shard_window must be 0 for data that are no shards, got {shard_window}"
        )
    if data.startswith(PREFIX):
        return HubImages(data, shortest_side)
    root, names, unreadable = find_images(data)
    files = ImageFiles(root, names, shortest_side)
    files.skipped.update(unreadable)
    return files


def _evaluated(files: Pictures, max_images: int) -> list[int]:
    """Positions of the readable ones among `max_images` evenly spaced files; [] for under two."""
    number = min(max_images, files.num_near)
    readable = []
    for i in range(number):
        position = i * files.num_near // number
        try:
            files.read(position)
        except BrokenImage:
            continue
        readable.append(position)
    return readable if len(readable) > 1 else []
