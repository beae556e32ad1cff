"""Masked autoencoding with ViT (He et al., 2021, arXiv:2111.06377).

B images, N patches, p pixels of a patch in all channels, D embedding.
"""

from __future__ import annotations

from torch import Tensor

from fastssl import functional as F
from fastssl import models
from fastssl.data import Batch
from fastssl.methods.base import Method


def unmask(patches: Tensor, pred: Tensor, removed: Tensor, norm_pix_loss: bool) -> Tensor:
    """True `patches` [B, N, p] with `pred` [B, N, p] where `removed` [B, N] is True.

    With `norm_pix_loss` a prediction lacks its patch's mean and scale: the true ones are given.
    """
    if norm_pix_loss:
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    return pred.to(patches.dtype).where(removed.unsqueeze(-1), patches)


class MAE(Method):
    """Predict the pixels of the patches that are hidden.

    `mask_ratio` of the patches are hidden; which ones is a function of (seed, epoch, index, view).
    """

    model_names = ("MaskedAutoencoderViT", *(n for n in models.__all__ if n.startswith("mae_vit")))
    size_argument = "img_size"

    def __init__(self, model: models.MaskedAutoencoderViT, *, mask_ratio: float, seed: int) -> None:
        super().__init__()
        self.model, self.mask_ratio, self.seed = model, mask_ratio, seed

    def noise(self, batch: Batch) -> Tensor:
        """[B, N] uniform numbers; the patches with the smallest stay visible."""
        rows, columns = self.model.patch_embed.grid_size(batch.images.shape[2:])
        return F.keyed_uniform(
            batch.index,
            rows * columns,
            seed=self.seed,
            epoch=batch.epoch,
            view=batch.view,
            stream=F.STREAM_MASK,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss, _, _ = self.model(batch.images, self.mask_ratio, self.noise(batch))
        return {"loss": loss}

    def features(self, images: Tensor) -> Tensor:
        return self.model.features(images)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        images, model = batch.images, self.model
        _, pred, mask = model(images, self.mask_ratio, self.noise(batch))
        patches, removed = model.patchify(images), mask.bool()
        grid_size = model.patch_embed.grid_size(images.shape[2:])
        masked = patches.masked_fill(removed.unsqueeze(-1), 0.0)
        predicted = unmask(patches, pred, removed, model.norm_pix_loss)
        return model.unpatchify(masked, grid_size), model.unpatchify(predicted, grid_size), images
