"""Masked autoencoding with Hiera (Ryali et al., 2023, arXiv:2306.00989).

B images, U mask units, N predicted tokens, p pixels of one in all channels, D embedding.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastssl import functional as F
from fastssl import models
from fastssl.data import Batch
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_ratio
from fastssl.methods.mae import unmask


class HieraMAE(Method):
    """Predict the pixels of the mask units that are hidden.

    `mask_ratio` of the units are hidden; which ones is a function of (seed, epoch, index, view).
    """

    encoder_type = models.MaskedAutoencoderHiera

    def __init__(self, setting: Setting, *, mask_ratio: float = 0.6) -> None:
        super().__init__()
        check_ratio(mask_ratio)
        self.model, self.mask_ratio, self.seed = setting.encoder, mask_ratio, setting.seed

    def noise(self, batch: Batch) -> Tensor:
        """[B, U] uniform numbers; the units with the smallest stay visible."""
        num_units = math.prod(self.model.units_shape(batch.images.shape[2:]))
        return batch.uniforms(num_units, seed=self.seed, stream=F.STREAM_MASK)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss, *_ = self.model(batch.images, self.mask_ratio, noise=self.noise(batch))
        return {"loss": loss}

    def features(self, images: Tensor) -> Tensor:
        return self.model.features(images)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        images, model = batch.images, self.model
        pred, visible = model.predict(images, self.mask_ratio, noise=self.noise(batch))
        patches, size = model.patchify(images), images.shape[2:]
        masked = patches.masked_fill(~visible.unsqueeze(-1), 0.0)
        predicted = unmask(patches, pred, ~visible, model.norm_pix_loss)
        return model.unpatchify(masked, size), model.unpatchify(predicted, size), images
