"""Vision Transformer with the state-dict keys of mae, dino, dinov2 and timm.

B images, N patches, P prefix tokens (class token, then registers), D embedding.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from fastssl.models.hub import HubModel
from fastssl.models.norm_names import norm_layer_of
from fastssl.nn import (
    LAYER_NORM,
    Block,
    Mlp,
    NormLayer,
    PatchEmbed,
    SwiGLU,
    interpolate_pos_embed,
)
from fastssl.nn.checkpoint import BlockCheckpointing

Size = int | tuple[int, int]
POOLS = ("token", "avg")
FFN_LAYERS = {"mlp": Mlp, "swiglu": SwiGLU}


def pair(name: str, value: Size) -> tuple[int, int]:
    """`value`, an int or two of them, as (height, width)."""
    sides = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"{name} must be a positive int or (height, width), got {value!r}")
    return sides


class ViTEncoder(nn.Module, BlockCheckpointing, HubModel):
    """What every ViT here shares: patch embedding, prefix tokens, positions, blocks, norm.

    Parameters are left uninitialised: a subclass adds its own and calls `init_weights`.
    """

    def __init__(
        self,
        img_size: Size,
        patch_size: Size,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: str | NormLayer,
        *,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        ffn_layer: str = "mlp",
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            names = ", ".join(FFN_LAYERS)
            raise ValueError(f"ffn_layer must be one of {names}, got {ffn_layer!r}")
        norm_layer = norm_layer_of(norm_layer)
        self.embed_dim = self.num_features = embed_dim
        self.patch_size = pair("patch_size", patch_size)
        self.num_prefix_tokens = 1 + num_register_tokens
        self.interpolate_antialias = interpolate_antialias

        self.patch_embed = PatchEmbed(in_chans, embed_dim, self.patch_size)
        self.grid_size = self.patch_embed.grid_size(pair("img_size", img_size))
        num_patches = self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        # Stochastic depth grows linearly from nothing to `drop_path_rate` in the last block.
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                init_values,
                drop_path=drop_path_rate * (i / max(depth - 1, 1)),
                norm_layer=norm_layer,
                ffn_layer=FFN_LAYERS[ffn_layer],
            )
            for i in range(depth)
        )
        self.norm = norm_layer(embed_dim)

    def init_weights(self) -> None:
        """Random initialisation; to be called again after `to_empty`."""
        raise NotImplementedError

    def pos_embed_grids(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Each position embedding's key with its token grid and its number of prefix tokens."""
        return {"pos_embed": (self.grid_size, 1)}

    def forward_features(
        self,
        images: Tensor,
        *,
        ids_keep: Tensor | None = None,
        masks: Tensor | None = None,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Normed tokens [B, P + N, D] of images [B, C, H, W]: class token, registers, patches.

        `ids_keep` [B, K] lets only these patches in, in this order: [B, P + K, D]. `masks` [B, N]
        bool puts the mask token in place of a patch where True, as DINOv2 does; the two exclude
        each other. `select` takes out of [B, P + N, D] the tokens that are wanted, as [..., D], and
        the last block spares what it would do for the others alone: three quarters of its work.
        """
        if ids_keep is not None and masks is not None:
            raise ValueError("ids_keep and masks cannot be given together")
        x = self.patch_embed(images, ids_keep)
        if masks is not None:
            x = self._put_mask_token(x, masks)
        pos_embed = interpolate_pos_embed(
            self.pos_embed,
            self.grid_size,
            self.patch_embed.grid_size(images.shape[2:]),
            num_prefix_tokens=1,
            antialias=self.interpolate_antialias,
        )
        patch_pos = pos_embed[:, 1:] if ids_keep is None else pos_embed[0, 1:][ids_keep]
        prefix = [self.cls_token + pos_embed[:, :1]]
        if self.num_prefix_tokens > 1:
            prefix.append(self.register_tokens)
        # Not len(x), which torch.export takes for a constant.
        batch = x.shape[0]
        x = torch.cat([*(p.expand(batch, -1, -1) for p in prefix), x + patch_pos], dim=1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, *([select] if select is not None and i == last else []))
        return self.norm(x)

    def _put_mask_token(self, x: Tensor, masks: Tensor) -> Tensor:
        raise ValueError("masks needs a VisionTransformer built with use_mask_token=True")

    def features(self, images: Tensor, pool: str = "avg") -> Tensor:
        """Image features [B, D] for frozen evaluation: the mean of the normed patch tokens, or
        with `pool="token"` the normed class token."""
        return self._pooled(images, _check_pool("pool", pool))

    def _pooled(self, images: Tensor, pool: str) -> Tensor:
        if pool == "token":
            return self.forward_features(images, select=class_token)
        return self.forward_features(images)[:, self.num_prefix_tokens :].mean(1)


class VisionTransformer(ViTEncoder):
    """Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929).

    `img_size` and `patch_size` are an int or (height, width). Images of another size than
    `img_size` are taken too, with the position embedding resampled to their grid; a size that the
    patch size does not divide is a ValueError. `init_values` not None adds LayerScale,
    `num_register_tokens` adds registers behind the class token (Darcet et al., 2023,
    arXiv:2309.16588), `use_mask_token` the learned token that iBOT and DINOv2 put in place of
    masked patches, `ffn_layer="swiglu"` gates the feed-forward layers. DINOv2's released weights
    fit `img_size=518, patch_size=14, init_values=1.0`; its register models have
    `num_register_tokens=4, interpolate_antialias=True` besides, and its ViT-g has the gates.
    `norm_layer` is a constructor or a name, see `norm_layer_of`.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
        num_register_tokens: int = 0,
        use_mask_token: bool = False,
        interpolate_antialias: bool = False,
        ffn_layer: str = "mlp",
        norm_layer: str | NormLayer = LAYER_NORM,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            norm_layer,
            qkv_bias=qkv_bias,
            init_values=init_values,
            drop_path_rate=drop_path_rate,
            num_register_tokens=num_register_tokens,
            interpolate_antialias=interpolate_antialias,
            ffn_layer=ffn_layer,
        )
        self.global_pool = _check_pool("global_pool", global_pool)
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim)) if use_mask_token else None
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Random initialisation as in DINO and timm; to be called again after `to_empty`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for tokens in self.parameters(recurse=False):
            nn.init.trunc_normal_(tokens, std=0.02)

    def _put_mask_token(self, x: Tensor, masks: Tensor) -> Tensor:
        if self.mask_token is None:
            return super()._put_mask_token(x, masks)
        return torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)

    def forward(self, images: Tensor) -> Tensor:
        """head(pooled tokens): [B, num_classes], or [B, D] where `num_classes` is 0.

        `global_pool="token"`, the class token, is what DINO, DINOv2 and MAE return.
        """
        return self.head(self._pooled(images, self.global_pool))


def class_token(tokens: Tensor) -> Tensor:  # [B, P + N, D] -> [B, D]
    return tokens[:, 0]


def _check_pool(name: str, pool: str) -> str:
    if pool not in POOLS:
        raise ValueError(f"{name} must be one of {', '.join(POOLS)}, got {pool!r}")
    return pool


def vit_tiny(patch_size: Size = 16, **kwargs) -> VisionTransformer:
    """ViT-Ti: D = 192, 12 blocks, 3 heads. Keywords as VisionTransformer, for all factories."""
    config = {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": patch_size}
    return VisionTransformer(**config | kwargs)


def vit_small(patch_size: Size = 16, **kwargs) -> VisionTransformer:
    """ViT-S: D = 384, 12 blocks, 6 heads."""
    config = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": patch_size}
    return VisionTransformer(**config | kwargs)


def vit_base(patch_size: Size = 16, **kwargs) -> VisionTransformer:
    """ViT-B: D = 768, 12 blocks, 12 heads."""
    config = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": patch_size}
    return VisionTransformer(**config | kwargs)


def vit_large(patch_size: Size = 16, **kwargs) -> VisionTransformer:
    """ViT-L: D = 1024, 24 blocks, 16 heads."""
    config = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": patch_size}
    return VisionTransformer(**config | kwargs)


def vit_huge(patch_size: Size = 14, **kwargs) -> VisionTransformer:
    """ViT-H: D = 1280, 32 blocks, 16 heads."""
    config = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": patch_size}
    return VisionTransformer(**config | kwargs)


vit_tiny_patch16 = partial(vit_tiny, patch_size=16)
vit_small_patch16 = partial(vit_small, patch_size=16)
vit_base_patch16 = partial(vit_base, patch_size=16)
vit_large_patch16 = partial(vit_large, patch_size=16)
vit_huge_patch16 = partial(vit_huge, patch_size=16)
vit_tiny_patch14 = partial(vit_tiny, patch_size=14)
vit_small_patch14 = partial(vit_small, patch_size=14)
vit_base_patch14 = partial(vit_base, patch_size=14)
vit_large_patch14 = partial(vit_large, patch_size=14)
vit_huge_patch14 = partial(vit_huge, patch_size=14)
