"""Masked autoencoding with Hiera (Ryali et al., 2023, arXiv:2306.00989).

B images, U mask units, N predicted tokens, p pixels of one in all channels, D embedding.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastssl import functional as F
from fastssl import models
from fastssl.data import Batch
from fastssl.methods.base import Method
from fastssl.methods.mae import unmask


class HieraMAE(Method):
    """Predict the pixels of the mask units that are hidden.

    `mask_ratio` of the units are hidden; which ones is a function of (seed, epoch, index, view).
    """

    model_names = (
        "MaskedAutoencoderHiera",
        *(n for n in models.__all__ if n.startswith("mae_hiera") and n.endswith("_224")),
    )
    size_argument = "input_size"

    def __init__(
        self, model: models.MaskedAutoencoderHiera, *, mask_ratio: float, seed: int
    ) -> None:
        super().__init__()
        self.model, self.mask_ratio, self.seed = model, mask_ratio, seed

    def noise(self, batch: Batch) -> Tensor:
        """[B, U] uniform numbers; the units with the smallest stay visible."""
        return F.keyed_uniform(
            batch.index,
            math.prod(self.model.units_shape(batch.images.shape[2:])),
            seed=self.seed,
            epoch=batch.epoch,
            view=batch.view,
            stream=F.STREAM_MASK,
        )

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
