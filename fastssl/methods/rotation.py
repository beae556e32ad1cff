"""Rotation prediction, RotNet (Gidaris et al., 2018, arXiv:1803.07728)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import functional as F
from fastssl.data import Batch
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, num_features, rotations


class Rotation(Method):
    """By which multiple of 90 degrees was this image turned? Four classes, cross-entropy.

    all_rotations: every image is shown in all four rotations, four times the images of a batch,
        which the paper found to be better; otherwise in one that is drawn for (seed, epoch, index).
    """

    def __init__(self, setting: Setting, *, all_rotations: bool = True) -> None:
        super().__init__()
        check_views(setting, "rotation", 1)
        height, width = setting.views[0].size
        if height != width:
            raise ValueError(
                f"views.image_size must be square for rotation, got {height} x {width}"
            )
        self.all_rotations, self.seed = all_rotations, setting.seed
        self.model = setting.encoder
        self.head = nn.Linear(num_features(setting), 4)

    def rotated(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images [4 * B or B, C, S, S] and the quarter turns, anticlockwise, of each."""
        images, size = batch.images, len(batch)
        copies = rotations(images)
        if self.all_rotations:
            turns = torch.arange(4, device=images.device).repeat_interleave(size)
            return copies.flatten(0, 1), turns
        uniform = batch.uniforms(1, seed=self.seed, stream=F.STREAM_METHOD)
        turns = (4 * uniform[:, 0]).long()
        return copies[turns, torch.arange(size, device=images.device)], turns

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images, turns = self.rotated(batch)
        features = self.model(images)
        logits = self.head(features)
        loss = nn.functional.cross_entropy(logits, turns)
        accuracy = (logits.detach().argmax(1) == turns).float().mean()
        return {"loss": loss, "features": features.detach(), "accuracy": accuracy}
