"""What a loader yields and a method takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastssl import functional as F


@dataclass
class Decoded:
    """Decoded pictures, and what V views of each of them are: arguments of `augment_views`.

    pixels: [P] uint8. offsets [B], shapes [B, 2]: where each picture lies in them.
    boxes: [V, B, 4] int64. params: [V, B, 13] float32.
    sizes: (height, width) of each view.
    """

    pixels: Tensor
    offsets: Tensor
    shapes: Tensor
    boxes: Tensor
    params: Tensor
    sizes: tuple[tuple[int, int], ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Decoded:
        """The same with `function` of every tensor."""
        tensors = self.pixels, self.offsets, self.shapes, self.boxes, self.params
        return Decoded(*map(function, tensors), self.sizes)


@dataclass
class Batch:
    """Views of the samples of one micro-batch, and what names them, so that randomness is keyed.

    views: each [B, C, H, W], float32 and normalised (uint8 between a worker and the loader).
    index: [B] int64, the stable id of each sample in its dataset, the same on any rank.
    epoch, view: with the index, the key of every random number drawn for the sample.
    step: the optimizer step that the batch is for.
    labels: [B] int64, in evaluation only.
    skipped: {path: reason} of the broken files met while this batch was read.
    decoded: in place of views, from a worker, what the loader makes them of on its device.
    """

    views: tuple[Tensor, ...]
    index: Tensor
    epoch: int = 0
    view: int = 0
    step: int = 0
    labels: Tensor | None = None
    skipped: dict[str, str] | None = None
    decoded: Decoded | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    @property
    def images(self) -> Tensor:
        """The first view, for those who ask for one."""
        return self.views[0]

    def uniforms(self, num: int, *, seed: int, stream: int) -> Tensor:
        """[B, num] float32 of [0, 1), a function of the samples, the epoch and the view."""
        key = {"seed": seed, "epoch": self.epoch, "view": self.view, "stream": stream}
        return F.keyed_uniform(self.index, num, **key)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Called by the data loader's pinning thread."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors, too."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            views=tuple(function(view) for view in self.views),
            index=function(self.index),
            labels=None if self.labels is None else function(self.labels),
            decoded=None if self.decoded is None else self.decoded.map(function),
        )
