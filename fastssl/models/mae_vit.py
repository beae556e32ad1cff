"""Masked autoencoder with a ViT (He et al., 2021, arXiv:2111.06377), official keys and arguments.

B images, N patches, K visible patches, D embedding, p patch height * patch width * C.
"""

from functools import partial

import torch
from torch import Tensor, nn

from fastssl import functional
from fastssl.models.norm_names import norm_layer_of
from fastssl.models.vit import Size, ViTEncoder
from fastssl.nn import (
    LAYER_NORM,
    Block,
    Linear,
    NormLayer,
    interpolate_pos_embed,
    sincos_pos_embed_2d,
)
from fastssl.nn.norm import layer_norm


class MaskedAutoencoderViT(ViTEncoder):
    """Encode the visible patches of an image, predict the pixels of the others.

    Only visible patches are embedded. `img_size` and `patch_size` are an int or (height, width);
    images of another size than `img_size` are taken with both position embeddings resampled, a
    size that the patch size does not divide is a ValueError. `norm_pix_loss` predicts each patch
    less its mean, divided by its standard deviation. `mask_in_encoder` lets the encoder see all
    patches, a learned token in the places of the hidden ones, as BERT does: the paper's table 1(c),
    worse and slower. Its `mask_token` has the encoder's width, then, and the decoder none.

    `model(imgs)` is one pretraining forward; `model.features(imgs)` are the features [B, D] of
    the whole image for frozen evaluation.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: str | NormLayer = nn.LayerNorm,
        norm_pix_loss: bool = False,
        mask_in_encoder: bool = False,
    ) -> None:
        norm_layer = norm_layer_of(norm_layer)
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, norm_layer
        )
        self.norm_pix_loss = norm_pix_loss
        self.mask_in_encoder = mask_in_encoder
        self.decoder_embed = Linear(embed_dim, decoder_embed_dim)
        mask_token_dim = embed_dim if mask_in_encoder else decoder_embed_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, mask_token_dim))
        num_tokens = self.pos_embed.shape[1]
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, num_tokens, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        num_pixels = self.patch_size[0] * self.patch_size[1] * in_chans
        self.decoder_pred = Linear(decoder_embed_dim, num_pixels)
        self.pos_embed.requires_grad_(False)
        self.decoder_pos_embed.requires_grad_(False)
        self.init_weights()

    def init_weights(self) -> None:
        """Random initialisation of the paper; to be called again after `to_empty`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        # The convolution is a linear layer over patches, and its fan is counted as one.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            for pos_embed in (self.pos_embed, self.decoder_pos_embed):
                pos_embed.copy_(sincos_pos_embed_2d(pos_embed.shape[-1], self.grid_size, 1))

    def pos_embed_grids(self) -> dict[str, tuple[tuple[int, ...], int]]:
        return {name: (self.grid_size, 1) for name in ("pos_embed", "decoder_pos_embed")}

    def patchify(self, imgs: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, p], the pixels of a patch in order (row, column, channel)."""
        rows, columns = self.patch_embed.grid_size(imgs.shape[2:])
        height, width = self.patch_size
        x = imgs.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """[B, N, p] -> [B, C, H, W]; `grid_size` (default: the model's) is (rows, columns)."""
        x = x.unflatten(1, grid_size or self.grid_size).unflatten(3, (*self.patch_size, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def forward_encoder(
        self, imgs: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latent [B, 1 + K, D] of the visible patches, mask [B, N] and ids_restore [B, N].

        The patches with the K = int(N * (1 - mask_ratio)) smallest values of `noise` [B, N]
        (default: uniform random) stay visible. With `mask_in_encoder` the latent is [B, 1 + N, D],
        of all patches in their order.
        """
        rows, columns = self.patch_embed.grid_size(imgs.shape[2:])
        shape = (imgs.shape[0], rows * columns)
        len_keep = int(shape[1] * (1 - mask_ratio))
        if not 1 <= len_keep < shape[1]:
            # All removed is nothing to encode, none removed is a loss of 0 / 0.
            raise ValueError(
                f"mask_ratio must leave 1 to {shape[1] - 1} of {shape[1]} patches, got {mask_ratio}"
            )
        if noise is None:
            noise = torch.rand(shape, device=imgs.device)
        elif noise.shape != shape:
            raise ValueError(f"noise must have shape {list(shape)}, got {list(noise.shape)}")
        ids_keep, ids_restore, mask = functional.random_masking(noise, len_keep)
        if self.mask_in_encoder:
            return self.forward_features(imgs, masks=mask.bool()), mask, ids_restore
        return self.forward_features(imgs, ids_keep=ids_keep), mask, ids_restore

    def _put_mask_token(self, x: Tensor, masks: Tensor) -> Tensor:
        if not self.mask_in_encoder:
            raise ValueError("masks needs a MaskedAutoencoderViT built with mask_in_encoder=True")
        return self.mask_token.to(x.dtype).where(masks.unsqueeze(-1), x)

    def forward_decoder(
        self,
        x: Tensor,
        ids_restore: Tensor,
        grid_size: tuple[int, int] | None = None,
        *,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Latent of `forward_encoder` -> predicted pixels [B, N, p]; `grid_size` as in
        `unpatchify`.

        `wanted` are ids [B, M] of patches and their ids_restore [B, N], as of `masked_gather`:
        those of the others are 0, and what is theirs alone is not computed.
        """
        pos_embed = interpolate_pos_embed(
            self.decoder_pos_embed, self.grid_size, grid_size or self.grid_size, 1
        )
        x = self.decoder_embed(x)
        if self.mask_in_encoder:
            x = x + pos_embed
        else:
            x = functional.masked_scatter(
                x, self.mask_token, ids_restore, pos_embed, num_prefix_tokens=1
            )
        if wanted is None:
            for block in self.decoder_blocks:
                x = self.run_block(block, x)
            return self._pixels(x)
        ids, ranks = wanted
        select = partial(
            functional.masked_gather, ids_keep=ids, ids_restore=ranks, num_prefix_tokens=1
        )
        last = len(self.decoder_blocks) - 1
        for i, block in enumerate(self.decoder_blocks):
            x = self.run_block(block, x, *([select] if i == last else []))
        pred = self._pixels(x if self.decoder_blocks else select(x))
        return functional.masked_scatter(pred, pred.new_zeros(pred.shape[2]), ranks)

    def _pixels(self, x: Tensor) -> Tensor:
        return self.decoder_pred(layer_norm(self.decoder_norm, x[:, 1:]))

    def predict(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        *,
        removed_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(pred [B, N, p], mask [B, N]) as of `forward`."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        wanted = None
        if removed_only:
            # Every row removes as many patches; a stable order of 0 and 1 lists them, these first.
            num_removed = mask.shape[1] - int(mask.shape[1] * (1 - mask_ratio))
            wanted = functional.random_masking(1 - mask.float(), num_removed)[:2]
        grid_size = self.patch_embed.grid_size(imgs.shape[2:])
        return self.forward_decoder(latent, ids_restore, grid_size, wanted=wanted), mask

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the patches whose mask is 1, a scalar."""
        return functional.masked_patch_mse(
            pred,
            imgs,
            mask,
            patch_size=self.patch_size,
            norm_pix_loss=self.norm_pix_loss,
            patch_layout="hwc",
        )

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        *,
        removed_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, pred [B, N, p], mask [B, N]) of images [B, C, H, W].

        In `mask`, 1 is a patch that was REMOVED and counts in the loss, 0 one that was seen (the
        opposite of Hiera's masks). `noise` [B, N] fixes the choice: the smallest values are seen.

        `removed_only` spares the pixels of seen patches, which no loss asks for: their `pred` is 0,
        loss and gradients are the same.
        """
        pred, mask = self.predict(imgs, mask_ratio, noise, removed_only=removed_only)
        return self.forward_loss(imgs, pred, mask), pred, mask


def _mae_vit(embed_dim: int, depth: int, num_heads: int, patch_size: int, kwargs: dict):
    config = {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "norm_layer": LAYER_NORM,
    }
    return MaskedAutoencoderViT(**config | kwargs)


def mae_vit_base_patch16_dec512d8b(**kwargs) -> MaskedAutoencoderViT:
    """MAE ViT-B/16 as released. Keywords as MaskedAutoencoderViT, for all factories."""
    return _mae_vit(768, 12, 12, 16, kwargs)


def mae_vit_large_patch16_dec512d8b(**kwargs) -> MaskedAutoencoderViT:
    """MAE ViT-L/16 as released."""
    return _mae_vit(1024, 24, 16, 16, kwargs)


def mae_vit_huge_patch14_dec512d8b(**kwargs) -> MaskedAutoencoderViT:
    """MAE ViT-H/14 as released."""
    return _mae_vit(1280, 32, 16, 14, kwargs)


mae_vit_base_patch16 = mae_vit_base_patch16_dec512d8b
mae_vit_large_patch16 = mae_vit_large_patch16_dec512d8b
mae_vit_huge_patch14 = mae_vit_huge_patch14_dec512d8b
