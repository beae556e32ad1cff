"""Masked autoencoder with Hiera (Ryali et al., 2023, arXiv:2306.00989): images and clips.

Keys and arguments are the official ones.

B images, U mask units in an image, K of them kept, t tokens in a unit after all poolings,
N = U * t tokens predicted, D embedding, p = patch height * patch width * C.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastssl import functional
from fastssl.models.hiera import VIDEO, WIDTHS, Hiera, count_kept_units
from fastssl.models.norm_names import norm_layer_of
from fastssl.nn import Linear, NormLayer, interpolate_pos_embed
from fastssl.nn.mask_units import HieraBlock, UnitLayout
from fastssl.nn.norm import layer_norm


class FusionHead(nn.Module):
    """The convolution that brings an early stage's tokens to the final resolution.

    [B, K * u, dim] in the order of `layout` -> [B, K * t, dim_out]. Its kernel and stride are what
    the poolings still to come merge, so that it is one matrix product. Keys: weight [dim_out, dim,
    *kernel], bias.
    """

    def __init__(self, dim: int, dim_out: int, layout: UnitLayout) -> None:
        super().__init__()
        kernel = tuple(q**layout.num_pools for q in layout.q_stride)
        self.num_final = math.prod(layout.final_shape)
        self.kernel = UnitLayout(kernel, layout.q_stride, layout.num_pools)
        self.weight = nn.Parameter(torch.empty(dim_out, dim, *kernel))
        self.bias = nn.Parameter(torch.empty(dim_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of torch's convolutions."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel.unroll(self.weight.movedim(1, -1))  # [dim_out, prod(kernel), dim]
        # [B, K, prod(kernel), t, dim] -> [B, K * t, prod(kernel) * dim]
        x = x.unflatten(1, (-1, self.kernel.num_tokens, self.num_final)).transpose(2, 3)
        device = x.device.type
        if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
            # The cast that the product needs brings the tokens into their order, too.
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype, memory_format=torch.contiguous_format)
        return functional.linear(x.flatten(3).flatten(1, 2), weight.flatten(1), self.bias)


class MaskedAutoencoderHiera(Hiera):
    """Encode the kept mask units of an image or clip, predict the pixels of the others.

    Of removed units nothing is ever embedded. The decoder sees the encoder's stages fused at the
    resolution that the `q_pool` poolings leave (the released models pool twice, see the factories)
    and predicts a patch of pixels for each token there, of a clip in the first frame that the token
    stands for. `norm_pix_loss` (how the released models were trained) predicts each patch less its
    mean, divided by its standard deviation. Other keywords as Hiera; those of its head do nothing.

    `model(x)` is one pretraining forward, `model.predict(x)` gives every token's pixels for
    pictures, and `model.features(x)` the features [B, D] of the whole input for frozen evaluation.
    """

    def __init__(
        self,
        in_chans: int = 3,
        patch_stride: Sequence[int] = (4, 4),
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_layer: str | NormLayer = "LayerNorm",
        norm_pix_loss: bool = True,
        **kwargs,
    ) -> None:
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth must be at least 1, got {decoder_depth}")
        norm_layer = norm_layer_of(norm_layer)
        shared = {"in_chans": in_chans, "patch_stride": patch_stride, "mlp_ratio": mlp_ratio}
        super().__init__(norm_layer=norm_layer, **kwargs | shared | {"num_classes": 0})
        del self.norm, self.head
        self.norm_pix_loss = norm_pix_loss
        # The pixels that a predicted token stands for, and the token grid.
        layout = self.layouts[0]
        self.pred_size = tuple(
            s * q**self.q_pool for s, q in zip(patch_stride, layout.q_stride, strict=True)
        )
        self.tokens_spatial_shape_final = tuple(
            n * s // p
            for n, s, p in zip(self.tokens_spatial_shape, patch_stride, self.pred_size, strict=True)
        )
        self.encoder_norm = norm_layer(self.num_features)
        self.multi_scale_fusion_heads = nn.ModuleList(
            FusionHead(dim, self.num_features, layout)
            for dim, layout in zip(self.stage_dims, self.layouts[: self.q_pool], strict=False)
        )
        self.decoder_embed = Linear(self.num_features, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        num_tokens = math.prod(self.tokens_spatial_shape_final)
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, num_tokens, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            HieraBlock(
                decoder_embed_dim,
                decoder_embed_dim,
                decoder_num_heads,
                mlp_ratio,
                norm_layer=norm_layer,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = Linear(decoder_embed_dim, math.prod(self.pred_size[-2:]) * in_chans)
        self.init_weights()

    def init_weights(self) -> None:
        """Random initialisation as in the official code; to be called again after `to_empty`."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The convolution is a linear layer over patches, and its fan is counted as one.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        for name in ("mask_token", *self.pos_embed_grids()):
            nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def pos_embed_grids(self) -> dict[str, tuple[tuple[int, ...], int]]:
        grids = super().pos_embed_grids()
        return grids | {"decoder_pos_embed": (self.tokens_spatial_shape_final, 0)}

    def patchify(self, x: Tensor) -> Tensor:
        """The pixels [B, N, p] to be predicted for each token of [B, C, H, W] or [B, C, T, H, W].

        In order (channel, row, column) for images and (row, column, channel) for clips: so were
        the released models trained.
        """
        height, width = self.pred_size[-2:]
        x = self._first_frames(x)
        x = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).transpose(-3, -2)
        # [B, C, (T,) rows, columns, height, width]
        if x.dim() == 6:
            return x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return x.permute(0, 2, 3, 4, 5, 6, 1).flatten(4).flatten(1, 3)

    def unpatchify(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """[B, N, p] -> [B, C, H, W], or [B, C, T', H, W] with the first frame of each token.

        `size` is the input's (H, W) or (T, H, W).
        """
        height, width = self.pred_size[-2:]
        grid = self._final_grid(size)
        x = x.unflatten(1, grid)
        if len(grid) == 2:
            x = x.unflatten(3, (-1, height, width)).permute(0, 3, 1, 4, 2, 5)
        else:
            x = x.unflatten(4, (height, width, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        return x.flatten(-2).flatten(-3, -2)

    def forward_encoder(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Fused, normed tokens [B, K * t, D] of the units `ids_keep` [B, K], of all if None."""
        stages = self.forward_stages(x, ids_keep)
        x = stages[-1]
        # The stages before a pooling; those between the last pooling and the last stage do not add.
        for head, stage in zip(self.multi_scale_fusion_heads, stages, strict=False):
            x = x + head(stage)
        return self.encoder_norm(x)

    def forward_decoder(
        self, latent: Tensor, ids_restore: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Predicted pixels [B, N, p] of all tokens, and visible [B, N] bool: the encoder saw it.

        `latent` [B, K * t, D] are the first K units of `ids_restore` [B, U]; `size` is the input's.
        """
        x, visible = self._decoder_input(latent, ids_restore, size)
        return self._decode(x), visible

    def predict(
        self,
        x: Tensor,
        mask_ratio: float = 0.6,
        mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicted pixels [B, N, p] of all tokens, and visible [B, N] bool: the encoder saw it.

        Arguments as `forward`; pixels in the order of `patchify`, normalised if `norm_pix_loss`.
        """
        ids_keep, ids_restore = self._choose_units(x, mask_ratio, mask, noise)
        latent = self.forward_encoder(x, ids_keep)
        return self.forward_decoder(latent, ids_restore, x.shape[2:])

    def forward(
        self,
        x: Tensor,
        mask_ratio: float = 0.6,
        mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        return_labels: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(loss, preds, labels, mask) of images [B, C, H, W] or clips [B, C, T, H, W].

        `mask` bool [B, U], given and returned: 1 is a unit to KEEP, 0 one to remove and predict
        (the opposite of MAE's masks), in row-major order of units, as many in every row. Without
        one, the int(U * (1 - mask_ratio)) units with the smallest `noise` [B, U] (default: uniform
        random) are kept. Clips are usually trained with mask_ratio=0.9.

        The loss is the mean squared error of the removed tokens. `preds` and `labels`, both
        [B * removed tokens, p] in row-major order, are these tokens' pixels; `labels` are None
        unless `return_labels`.
        """
        ids_keep, ids_restore = self._choose_units(x, mask_ratio, mask, noise)
        latent = self.forward_encoder(x, ids_keep)
        y, visible = self._decoder_input(latent, ids_restore, x.shape[2:])
        # Every row removes as many tokens; a stable order of 0 and 1 lists them, the removed first.
        num_removed = y.shape[1] - latent.shape[1]
        ids_removed, ranks, _ = functional.random_masking(visible.float(), num_removed)
        preds = self._decode(y, ids_removed, ranks)
        is_clip = x.dim() == 5
        loss = functional.masked_patch_mse(
            functional.masked_scatter(preds, preds.new_zeros(preds.shape[2]), ranks),
            self._first_frames(x),
            ~visible,
            patch_size=(1, *self.pred_size[1:]) if is_clip else self.pred_size,
            norm_pix_loss=self.norm_pix_loss,
            patch_layout="hwc" if is_clip else "chw",
        )
        labels = self._labels(x, ids_removed) if return_labels else None
        return loss, preds.flatten(0, 1), labels, ids_restore < ids_keep.shape[1]

    def features(self, images: Tensor) -> Tensor:
        """Image features [B, D] for frozen evaluation: the mean of the normed, fused tokens."""
        return self.forward_encoder(images).mean(1)

    def _choose_units(
        self, x: Tensor, mask_ratio: float, mask: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """ids_keep [B, K] and ids_restore [B, U], from the arguments of `forward`."""
        shape = (x.shape[0], math.prod(self.units_shape(x.shape[2:])))
        if mask is not None:
            if noise is not None:
                raise ValueError("mask and noise cannot be given together")
            len_keep, noise = count_kept_units(mask, shape), (~mask).float()
        else:
            len_keep = int(shape[1] * (1 - mask_ratio))
            if noise is None:
                noise = torch.rand(shape, device=x.device)
            elif noise.shape != shape:
                raise ValueError(f"noise must have shape {list(shape)}, got {list(noise.shape)}")
        if not 1 <= len_keep < shape[1]:
            given = "mask" if mask is not None else f"mask_ratio={mask_ratio}"
            raise ValueError(
                f"{given} must keep 1 to {shape[1] - 1} of {shape[1]} units, it keeps {len_keep}"
            )
        ids_keep, ids_restore, _ = functional.random_masking(noise, len_keep)
        return ids_keep, ids_restore

    def _decoder_input(
        self, latent: Tensor, ids_restore: Tensor, size: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D'] in the order of the image, and which of them are visible [B, N]."""
        layout, grid = self.layouts[-1], self._final_grid(size)
        # A unit's rank becomes its tokens' ranks, which puts them at their places in the image.
        local = torch.arange(layout.num_tokens, device=ids_restore.device, dtype=ids_restore.dtype)
        ids = ids_restore.unsqueeze(2) * layout.num_tokens + local
        ids = layout.reroll(ids.view(len(ids), -1, 1), grid).flatten(1)
        pos_embed = interpolate_pos_embed(
            self.decoder_pos_embed, self.tokens_spatial_shape_final, grid
        )
        x = functional.masked_scatter(self.decoder_embed(latent), self.mask_token, ids, pos_embed)
        return x, ids < latent.shape[1]

    def _decode(self, x: Tensor, *wanted: Tensor) -> Tensor:
        """Pixels of the `wanted` (ids and ids_restore, as HieraBlock) of the tokens, or of all."""
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = self.run_block(block, x)
        x = self.run_block(last, x, *wanted)
        return self.decoder_pred(layer_norm(self.decoder_norm, x))

    def _labels(self, x: Tensor, ids: Tensor) -> Tensor:
        labels = functional.masked_gather(self.patchify(x), ids).flatten(0, 1)
        if not self.norm_pix_loss:
            return labels
        mean, var = labels.mean(-1, keepdim=True), labels.var(-1, keepdim=True)
        return (labels - mean) / (var + 1e-6).sqrt()

    def _first_frames(self, x: Tensor) -> Tensor:
        """Of a clip, the first frame that each predicted token stands for; images as they are."""
        return x[:, :, :: self.pred_size[0]] if x.dim() == 5 else x

    def _final_grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(s // p for s, p in zip(size, self.pred_size, strict=True))


def mae_hiera_tiny_224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-T as released. Keywords as MaskedAutoencoderHiera, for all factories."""
    return _mae_hiera("tiny", kwargs)


def mae_hiera_small_224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-S as released."""
    return _mae_hiera("small", kwargs)


def mae_hiera_base_224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-B as released."""
    return _mae_hiera("base", kwargs)


def mae_hiera_base_plus_224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-B+ as released."""
    return _mae_hiera("base_plus", kwargs)


def mae_hiera_large_224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-L as released."""
    return _mae_hiera("large", kwargs)


def mae_hiera_huge_224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-H as released."""
    return _mae_hiera("huge", kwargs)


def mae_hiera_base_16x224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-B for clips [B, 3, 16, 224, 224] as released."""
    return _mae_hiera("base", VIDEO | kwargs)


def mae_hiera_base_plus_16x224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-B+ for clips as released."""
    return _mae_hiera("base_plus", VIDEO | kwargs)


def mae_hiera_large_16x224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-L for clips as released."""
    return _mae_hiera("large", VIDEO | kwargs)


def mae_hiera_huge_16x224(**kwargs) -> MaskedAutoencoderHiera:
    """MAE Hiera-H for clips as released."""
    return _mae_hiera("huge", VIDEO | kwargs)


def _mae_hiera(width: str, kwargs: dict) -> MaskedAutoencoderHiera:
    return MaskedAutoencoderHiera(**{"q_pool": 2} | WIDTHS[width] | kwargs)
