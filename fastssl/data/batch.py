"""What a loader yields and a method takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Batch:
    """Images of one micro-batch and what names them, so that randomness can be keyed.

    images: [B, C, H, W], float32 and normalised (uint8 between a worker and the loader).
    index: [B] int64, the stable id of each sample in its dataset, the same on any rank.
    epoch, view: with the index, the key of every random number drawn for the sample.
    labels: [B] int64, in evaluation only.
    skipped: {path: reason} of the broken files met while this batch was read.
    """

    images: Tensor
    index: Tensor
    epoch: int = 0
    view: int = 0
    labels: Tensor | None = None
    skipped: dict[str, str] | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        labels = self.labels
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            labels=None if labels is None else labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Called by the data loader's pinning thread."""
        labels = self.labels
        return replace(
            self,
            images=self.images.pin_memory(),
            index=self.index.pin_memory(),
            labels=None if labels is None else labels.pin_memory(),
        )
