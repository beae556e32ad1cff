"""Masked autoencoding with ViT (He et al., 2021, arXiv:2111.06377).

B images, N patches, p pixels of a patch in all channels, D embedding.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastssl import functional as F
from fastssl import models
from fastssl.data import Batch
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_ratio
from fastssl.methods.mae_targets import build_target


def unmask(patches: Tensor, pred: Tensor, removed: Tensor, norm_pix_loss: bool) -> Tensor:
    """True `patches` [B, N, p] with `pred` [B, N, p] where `removed` [B, N] is True.

    With `norm_pix_loss` a prediction lacks its patch's mean and scale: the true ones are given.
    """
    if norm_pix_loss:
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    return pred.to(patches.dtype).where(removed.unsqueeze(-1), patches)


class MAE(Method):
    """Predict the patches that are hidden.

    `mask_ratio` of the patches are hidden; which ones is a function of (seed, epoch, index, view).

    target: "pixel"; "norm_pixel", each patch less its mean and divided by its standard deviation;
        "pca", its first `num_components` components; "tokens", what `tokenizer` makes of it, one of
        `num_tokens`: see `mae_targets`. None: pixels as the model's `norm_pix_loss` says.

    Depth and width of the decoder and `mask_in_encoder` are arguments of the model.
    """

    encoder_type = models.MaskedAutoencoderViT

    def __init__(
        self,
        setting: Setting,
        *,
        mask_ratio: float = 0.75,
        target: str | None = None,
        num_components: int = 96,
        tokenizer: str | nn.Module | None = None,
        num_tokens: int = 8192,
    ) -> None:
        super().__init__()
        check_ratio(mask_ratio)
        self.model, self.mask_ratio, self.seed = setting.encoder, mask_ratio, setting.seed
        self.target = build_target(
            target,
            self.model,
            num_components=num_components,
            tokenizer=tokenizer,
            num_tokens=num_tokens,
        )

    def noise(self, batch: Batch) -> Tensor:
        """[B, N] uniform numbers; the patches with the smallest stay visible."""
        rows, columns = self.model.patch_embed.grid_size(batch.images.shape[2:])
        return batch.uniforms(rows * columns, seed=self.seed, stream=F.STREAM_MASK)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        pred, mask = self.model.predict(
            batch.images, self.mask_ratio, self.noise(batch), removed_only=True
        )
        return {"loss": self.target(self.model, batch.images, pred, mask)}

    def features(self, images: Tensor) -> Tensor:
        return self.model.features(images)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
        images, model = batch.images, self.model
        pred, mask = model.predict(images, self.mask_ratio, self.noise(batch))
        pred = self.target.patches(pred)
        if pred is None:
            return None
        patches, removed = model.patchify(images), mask.bool()
        grid_size = model.patch_embed.grid_size(images.shape[2:])
        masked = patches.masked_fill(removed.unsqueeze(-1), 0.0)
        predicted = unmask(patches, pred, removed, model.norm_pix_loss)
        return model.unpatchify(masked, grid_size), model.unpatchify(predicted, grid_size), images
