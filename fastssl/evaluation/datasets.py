"""From the name of labelled data to what the measures see of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastssl.data import build_datasets
from fastssl.data.labelled import build_labelled
from fastssl.data.loader import CropsDataset
from fastssl.data.views import View

# Of ImageNet's usual fine-tuning.
_FINE_TUNE_SCALE = (0.08, 1.0)


@dataclass(frozen=True)
class EvaluationData:
    """train, test: labelled, what is learned from and judged on; augmented: train in random views,
    for fine-tuning; pairs: unlabelled, two views of each sample, for alignment."""

    train: CropsDataset
    test: CropsDataset
    augmented: CropsDataset
    pairs: CropsDataset
    classes: tuple[str, ...]


def build_evaluation(
    data: str,
    *,
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    views: Sequence[View],
    seed: int = 0,
    photos: dict[str, Any] | None = None,
) -> EvaluationData:
    """Labelled data as an encoder sees them.

    Args:
        data: a folder or "digits", as in `build_labelled`, or "photos": of which of the photographs
            a crop is, as in `build_datasets`; these crops are fixed, for fine-tuning too.
        image_size: side, or (height, width), of the centre crops.
        mean, std: of the RGB channels, for normalisation.
        views: a method's. Of an image the first two are a pair, or the only one twice: of the test
            images, or of the photographs as pretraining sees them.
        seed: of these views.
        photos: keywords of `build_datasets`.

    Raises:
        ValueError: data that cannot be used. ImportError: bundled data are not installed.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    views = [replace(view, number=1) for view in views for _ in range(view.number)]
    pair = views[:2] if len(views) > 1 else views * 2
    common = {"image_size": size, "mean": mean, "std": std}
    if data != "photos":
        train, test = build_labelled(data, **common)
        augmented = train.seen_through([View(size, scale=_FINE_TUNE_SCALE)])
        pairs = test.seen_through(pair, seed)
        return EvaluationData(train, test, augmented, pairs, train.classes)
    pairs, halves = build_datasets(data, views=pair, seed=seed, **(photos or {}), **common)
    if halves is None:
        raise ValueError("data=photos must have at least two photographs to tell apart")
    train, test = halves
    names = tuple(Path(train.files.path(position)).name for position in train.positions)
    return EvaluationData(train, test, train, pairs, names)
