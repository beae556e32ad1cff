"""Labelled images, to judge frozen features by: folders of classes, or scikit-learn's digits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastssl import functional as F
from fastssl.data.batch import Batch
from fastssl.data.crops import Request, whole
from fastssl.data.decode import BrokenImage, Pixels
from fastssl.data.digits import Digits
from fastssl.data.folder import ImageFiles, list_images
from fastssl.data.packed import is_pack
from fastssl.data.pictures import NewlySkipped
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Box
from fastssl.data.views import View, see_through

# Folders beside train, of what is judged on; the first that is there counts.
_JUDGED = ("val", "valid", "validation", "test")
# Beside the two halves of pictures and the few labels, views 0 to 2 of the stream.
_VIEW = 3


@dataclass(frozen=True)
class CenterCrop:
    """The view of evaluation: the short side to size * 256 / 224 (bicubic, antialiased), then the
    middle. size: (height, width) of the result."""

    size: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be two positive numbers, got {self.size}")

    def __call__(self, pixels: Pixels) -> Tensor:
        """[h, w, 3] -> uint8 [3, H, W]."""
        image = Image.fromarray(pixels)
        (height, width), (h, w) = self.size, (side * 256 // 224 for side in self.size)
        # The side that is the shorter for the wanted shape; the other is rounded down, as usual.
        if image.width * h <= image.height * w:
            resized = (w, image.height * w // image.width)
        else:
            resized = (image.width * h // image.height, h)
        left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
        # Only the middle is resized, from pixels around it too: the whole of a picture that is
        # hundreds of times longer than wide would fill the memory.
        x, y = image.width / resized[0], image.height / resized[1]
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(Protocol):
    """What `LabelledImages` reads from: `ImageFiles`, or `Digits`."""

    skipped: dict[str, str]

    def __len__(self) -> int: ...

    def path(self, position: int) -> str: ...

    def read(self, position: int) -> Pixels: ...


class LabelledImages(Dataset[Batch]):
    """Whole images, for evaluation; sample i is the image at positions[i] of `images`.

    A broken file is left out of its batch, which is then shorter, and reported in `skipped`: it is
    not replaced, since a neighbour would be counted twice.

    Args:
        images: where the pixels come from.
        views: of each sample; a `CenterCrop`, or random ones, drawn by (seed, epoch, sample).
        positions: [N] int64; None: all.
        labels: [N] int64, or None where there are none.
        classes: the names of labels 0, 1, ...
        mean, std: of the RGB channels, for normalisation, where white is 1.
    """

    def __init__(
        self,
        images: Images,
        views: CenterCrop | Sequence[View],
        *,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.images = images
        self.views = views
        self.positions = torch.arange(len(images)) if positions is None else positions
        self.labels = labels
        self.classes = tuple(classes)
        self.seed = seed
        self.mean, self.std = tuple(mean), tuple(std)
        self._new = NewlySkipped(images)

    def __len__(self) -> int:
        return len(self.positions)

    def path(self, index: int) -> str:
        return self.images.path(int(self.positions[index]))

    def seen_through(self, views: CenterCrop | Sequence[View], seed: int = 0) -> LabelledImages:
        """The same samples in other views."""
        return LabelledImages(
            self.images,
            views,
            positions=self.positions,
            labels=self.labels,
            classes=self.classes,
            seed=seed,
            mean=self.mean,
            std=self.std,
        )

    def __getitem__(self, request: Request) -> Batch:
        """Those samples of the request that can be read; each view is uint8 [B, 3, H, W]."""
        pictures = self._pictures(request.indices)
        if isinstance(self.views, CenterCrop):
            rows, crops = [], [torch.empty(0, 3, *self.views.size, dtype=torch.uint8)]
            for row, picture, _ in pictures:
                rows.append(row)
                crops.append(self.views(picture)[None])
            views = (torch.cat(crops),)
        else:
            rows, views = see_through(
                self.views, pictures, request.indices, seed=self.seed, epoch=request.epoch
            )
        index = request.indices[rows]
        labels = None if self.labels is None else self.labels[index]
        return Batch(views, index, request.epoch, labels=labels, skipped=self._new())

    def _pictures(self, indices: Tensor) -> Iterator[tuple[int, Pixels, Box]]:
        for row, position in enumerate(self.positions[indices].tolist()):
            try:
                picture = self.images.read(position)
            except BrokenImage:
                continue
            yield row, picture, whole(picture)


def build_labelled(
    data: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    seed: int = 0,
) -> tuple[LabelledImages, LabelledImages]:
    """What to learn from and what to be judged on, in centre crops.

    Args:
        data: "digits", or a folder: train/<class>/... and val/<class>/... (or valid, validation
            or test), or <class>/... alone. A class is the first folder, its files may lie deeper;
            labels go by the classes' sorted names. Without a folder to be judged on, and for
            digits, a fifth of each class is held out, chosen by `seed`; a class of one image is
            learned from.
        image_size: side, or (height, width), of what an encoder sees.

    Raises:
        ValueError: no such folder, fewer than two classes, nothing held out, a class to be judged
            on that train lacks, or a folder beside train with its classes and an unknown name.
        ImportError: the digits are not installed.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    common = {"views": CenterCrop(size), "mean": mean, "std": std}
    if str(data) == "digits":
        digits = Digits()
        return _split(digits, digits.labels, [str(digit) for digit in range(10)], seed, common)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"data must be 'digits' or a folder of class folders; {folder} {wrong}")
    if is_pack(folder):
        raise ValueError(
            "data must be the folder of class folders itself where labels are wanted; "
            f"{folder} was made by fastssl-data pack"
        )
    root, files, unreadable = list_images(folder)
    tops = {PurePath(file).parts[0] for file in files if len(PurePath(file).parts) > 1}
    judged = next((name for name in _JUDGED if name in tops), None)
    if judged is None and "train" in tops:
        _check_beside_train(root, files)
    if "train" in tops and judged:
        train, test = (_of_classes(root, files, unreadable, top) for top in ("train", judged))
        classes = _classes(data, train)
        if unknown := sorted(set(test.values()) - set(classes)):
            raise ValueError(
                f"data must have the classes of {judged} in train too; {root} lacks "
                f"{', '.join(unknown[:5])} there"
            )
        return tuple(
            LabelledImages(
                _image_files(root, chosen, unreadable),
                labels=_labels(chosen, classes),
                classes=classes,
                **common,
            )
            for chosen in (train, test)
        )
    chosen = _of_classes(root, files, unreadable, "train" if tops == {"train"} else None)
    classes = _classes(data, chosen)
    images = _image_files(root, chosen, unreadable)
    return _split(images, _labels(chosen, classes), classes, seed, common)


def rank_requests(
    num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Request]:
    """This rank's share of samples 0, 1, ..., as consecutive whole batches, perhaps none.

    Any number of ranks makes the same batches, so that a sample's features have the same bits.
    """
    batches = torch.arange(num_samples).split(batch_size)
    first, end = (len(batches) * r // world_size for r in (rank, rank + 1))
    # A view would carry all of them to the worker.
    return [Request(part.clone()) for part in batches[first:end] if len(part)]


def _of_classes(
    root: Path, files: Sequence[str], unreadable: dict[str, str], top: str | None
) -> dict[str, str]:
    """{file: class} of those below `top`; a file beside the classes' folders goes to the others."""
    found = {}
    for file in files:
        parts = PurePath(file).parts
        if top is not None and parts[0] != top:
            continue
        parts = parts if top is None else parts[1:]
        if len(parts) > 1:
            found[file] = parts[0]
        else:
            unreadable[str(root / file)] = "lies in no folder of a class"
    return found


def _check_beside_train(root: Path, files: Sequence[str]) -> None:
    """Refuse another folder with the classes of train, which would pass for a class itself."""
    inside: dict[str, set[str]] = {}
    for parts in (PurePath(file).parts for file in files):
        if len(parts) > 2:
            inside.setdefault(parts[0], set()).add(parts[1])
    train = inside.pop("train", set())
    if alike := sorted(name for name, classes in inside.items() if classes & train):
        raise ValueError(
            f"data must have {', '.join(_JUDGED[:-1])} or {_JUDGED[-1]} beside train; {root} has "
            f"folders of the same names in {', '.join(alike[:5])}"
        )


def _classes(data: str | os.PathLike[str], files: dict[str, str]) -> list[str]:
    classes = sorted(set(files.values()))
    if len(classes) < 2:
        raise ValueError(
            "data must be a folder with one folder of images for each of at least two classes, or "
            f"with such folders in train and val; {data} has {len(classes)}"
        )
    return classes


def _labels(files: dict[str, str], classes: Sequence[str]) -> Tensor:
    number = {name: label for label, name in enumerate(classes)}
    return torch.tensor([number[name] for name in files.values()])


def _image_files(root: Path, files: dict[str, str], unreadable: dict[str, str]) -> ImageFiles:
    images = ImageFiles(root, list(files))
    images.skipped.update(unreadable)
    return images


def _split(
    images: Images, labels: Tensor, classes: Sequence[str], seed: int, common: dict
) -> tuple[LabelledImages, LabelledImages]:
    held_out = _held_out(labels, seed)
    if not held_out.any():
        raise ValueError(
            "data must have a class of at least two images, of which to hold one out, or folders "
            "train and val"
        )
    return tuple(
        LabelledImages(images, positions=rows, labels=labels[rows], classes=classes, **common)
        for rows in ((~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0])
    )


def _held_out(labels: Tensor, seed: int, share: float = 0.2) -> Tensor:  # [N] -> [N] bool
    """A random part of every class of at least two, one at least."""
    index = torch.arange(len(labels))
    noise = F.keyed_uniform(index, 2, seed=seed, view=_VIEW, stream=F.STREAM_EVAL).double()
    order = torch.argsort(noise[:, 0] + noise[:, 1] * 2.0**-24, stable=True)
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    wanted = (counts * share).round().long().clamp(min=1).where(counts > 1, 0)
    # Classes lie one after the other in `order`.
    of_class = labels[order]
    place = index - (counts.cumsum(0) - counts)[of_class]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[order] = place < wanted[of_class]
    return held_out
