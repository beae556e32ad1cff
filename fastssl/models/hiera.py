"""Hiera (Ryali et al., 2023, arXiv:2306.00989) for images and clips, official keys and arguments.

B images, U mask units in an image, K of them kept, u tokens in a unit, N = U * u, D embedding.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import functional
from fastssl.models.hub import HubModel
from fastssl.models.norm_names import norm_layer_of
from fastssl.nn import NormLayer, PatchEmbed, interpolate_pos_embed
from fastssl.nn.checkpoint import BlockCheckpointing
from fastssl.nn.mask_units import HieraBlock, UnitLayout


class Head(nn.Module):
    """Dropout and a linear classifier: logits while training, probabilities in evaluation mode."""

    def __init__(self, dim: int, num_classes: int, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)
        self.projection = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(self.dropout(x))
        return x if self.training else x.softmax(dim=-1)


class Hiera(nn.Module, BlockCheckpointing, HubModel):
    """Hierarchical vision transformer of global attention and attention within mask units.

    `input_size` is (H, W), or (T, H, W) with the other sizes in three dimensions as well. Inputs of
    another size are taken too, with the position embedding resampled; a side that mask unit *
    patch stride (32 by default) does not divide is a ValueError.

    `stages` are the blocks of each stage. Between stages the width grows by `dim_mul` and the heads
    by `head_mul`; the first `q_pool` transitions also pool by `q_stride`. `mask_unit_attn` says
    which stages attend within mask units; the first block of a stage attends as the stage before.
    `norm_layer` is a name in torch.nn, then with eps 1e-6, or a callable. `num_classes=0` leaves
    the head out. `sep_pos_embed` (clips) learns one position embedding in space, one in time.

    Tokens stay in the order of `UnitLayout` from the patch embedding on: of masked units nothing is
    ever computed, and pooling and attention move no token.
    """

    def __init__(
        self,
        input_size: Sequence[int] = (224, 224),
        in_chans: int = 3,
        embed_dim: int = 96,
        num_heads: int = 1,
        num_classes: int = 1000,
        stages: Sequence[int] = (2, 3, 16, 3),
        q_pool: int = 3,
        q_stride: Sequence[int] = (2, 2),
        mask_unit_size: Sequence[int] = (8, 8),
        mask_unit_attn: Sequence[bool] = (True, True, False, False),
        dim_mul: float = 2.0,
        head_mul: float = 2.0,
        patch_kernel: Sequence[int] = (7, 7),
        patch_stride: Sequence[int] = (4, 4),
        patch_padding: Sequence[int] = (3, 3),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | NormLayer = "LayerNorm",
        head_dropout: float = 0.0,
        head_init_scale: float = 0.001,
        sep_pos_embed: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "q_stride": q_stride,
            "mask_unit_size": mask_unit_size,
            "patch_kernel": patch_kernel,
            "patch_stride": patch_stride,
            "patch_padding": patch_padding,
        }
        for name, value in {
            "input_size": input_size,
            "stages": stages,
            "mask_unit_attn": mask_unit_attn,
            **sizes,
        }.items():
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise TypeError(f"{name} must be a tuple, got {value!r}")
        if not 0 <= q_pool < len(stages):
            raise ValueError(f"q_pool must be in [0, {len(stages)}), got {q_pool}")
        if len(mask_unit_attn) < len(stages):
            raise ValueError(
                f"mask_unit_attn must have {len(stages)} entries as stages has,"
                f" got {tuple(mask_unit_attn)}"
            )
        q_stride, mask_unit_size, *patch_sizes = _check_sizes(input_size, sizes)
        if sep_pos_embed and len(input_size) != 3:
            raise ValueError(f"sep_pos_embed needs input_size (T, H, W), got {tuple(input_size)}")
        norm_layer = norm_layer_of(norm_layer)
        self.q_pool, self.sep_pos_embed = q_pool, sep_pos_embed
        self.head_init_scale = head_init_scale

        self.patch_embed = PatchEmbed(in_chans, embed_dim, *patch_sizes)
        # The layout of every stage's output.
        self.layouts = [UnitLayout(mask_unit_size, q_stride, q_pool)]
        for i in range(1, len(stages)):
            self.layouts.append(self.layouts[-1].pooled() if i <= q_pool else self.layouts[-1])
        self.unit_order = self.layouts[0].order
        self.tokens_spatial_shape = self.grid_size(tuple(input_size))
        for name, (grid, _) in Hiera.pos_embed_grids(self).items():
            setattr(self, name, nn.Parameter(torch.empty(1, math.prod(grid), embed_dim)))

        dims = [embed_dim]
        for _ in stages[1:]:
            dims.append(int(dims[-1] * dim_mul))
        self.embed_dim, self.num_features, self.stage_dims = dims[0], dims[-1], dims
        self.stage_ends = [sum(stages[: i + 1]) - 1 for i in range(len(stages))]
        self.blocks = nn.ModuleList()
        for stage, num_blocks in enumerate(stages):
            if stage > 0:
                num_heads = int(num_heads * head_mul)
            for i in range(num_blocks):
                before = stage - 1 if i == 0 and stage > 0 else stage
                block = HieraBlock(
                    dims[before],
                    dims[stage],
                    num_heads,
                    mlp_ratio,
                    # Stochastic depth grows linearly up to `drop_path_rate` in the last block.
                    drop_path_rate * (len(self.blocks) / max(self.stage_ends[-1], 1)),
                    norm_layer,
                    q_stride=math.prod(q_stride) if before < stage <= q_pool else 1,
                    window_size=self.layouts[stage].num_tokens,
                    use_mask_unit_attn=mask_unit_attn[before],
                )
                self.blocks.append(block)
        self.norm = norm_layer(dims[-1])
        self.head = Head(dims[-1], num_classes, head_dropout) if num_classes else nn.Identity()
        # Not a subclass's, whose own parameters do not exist yet.
        Hiera.init_weights(self)

    def init_weights(self) -> None:
        """Random initialisation as in the official code; to be called again after `to_empty`."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear | nn.LayerNorm):
                nn.init.constant_(module.bias, 0.02)
        for name in Hiera.pos_embed_grids(self):
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(self.head_init_scale)

    def pos_embed_grids(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Each position embedding's key with its token grid and its number of prefix tokens."""
        if not self.sep_pos_embed:
            return {"pos_embed": (self.tokens_spatial_shape, 0)}
        frames, *image = self.tokens_spatial_shape
        return {"pos_embed_spatial": (tuple(image), 0), "pos_embed_temporal": ((frames,), 0)}

    def grid_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each dimension of an input of `size`; ValueError if it is none of ours."""
        stride = self.patch_embed.proj.stride
        unit = tuple(s * u for s, u in zip(stride, self.layouts[0].shape, strict=True))
        if len(size) != len(unit):
            axes = "H, W" if len(unit) == 2 else "T, H, W"
            raise ValueError(f"inputs must have dimensions [B, C, {axes}], got {len(size) + 2}")
        if any(s < 1 or s % u for s, u in zip(size, unit, strict=True)):
            raise ValueError(
                f"input size must be divisible by {_times(unit)} (mask unit * patch stride),"
                f" got {_times(size)}"
            )
        return tuple(i // s for i, s in zip(size, stride, strict=True))

    def units_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Mask units along each dimension of an input of `size`; a mask has their product."""
        grid = self.grid_size(size)
        return tuple(n // u for n, u in zip(grid, self.layouts[0].shape, strict=True))

    def get_pos_embed(self, grid: tuple[int, ...]) -> Tensor:
        """Position embedding [1, N, D] of a token grid, in row-major order."""
        own = self.tokens_spatial_shape
        if not self.sep_pos_embed:
            return interpolate_pos_embed(self.pos_embed, own, grid)
        spatial = interpolate_pos_embed(self.pos_embed_spatial, own[1:], grid[1:])
        temporal = interpolate_pos_embed(self.pos_embed_temporal, own[:1], grid[:1])
        return (spatial.unsqueeze(1) + temporal.unsqueeze(2)).flatten(1, 2)

    def forward_stages(self, x: Tensor, ids_keep: Tensor | None = None) -> list[Tensor]:
        """Each stage's output [B, K * u, C] for inputs [B, C, *size], in the order of `layouts`.

        `ids_keep` int [B, K] are the units to see, in this order; None sees all.
        """
        grid = self.grid_size(x.shape[2:])
        layout = self.layouts[0]
        pos_embed = layout.unroll(self.get_pos_embed(grid).unflatten(1, grid))
        if ids_keep is None:
            x = layout.unroll(self.patch_embed(x).unflatten(1, grid)) + pos_embed
        else:
            x = self.patch_embed(x, ids_keep, unit_size=layout.shape, unit_order=self.unit_order)
            unit_pos = pos_embed.reshape(-1, layout.num_tokens * pos_embed.shape[-1])
            x = x + F.embedding(ids_keep, unit_pos).view(x.shape)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if i in self.stage_ends:
                outputs.append(x)
        return outputs

    def features(self, images: Tensor) -> Tensor:
        """Image features [B, D] for frozen evaluation: the norm of the mean of the last tokens."""
        return self.norm(self.forward_stages(images)[-1].mean(1))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_intermediates: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Class probabilities (logits while training) of [B, C, H, W] or [B, C, T, H, W].

        `mask` bool [B, U]: 1 is a unit to KEEP, 0 one to remove (the opposite of MAE's masks), in
        row-major order of units and as many in every row. With a mask the result is the last
        stage's tokens [B, K * u, D] instead, unit by unit. `return_intermediates` adds each
        stage's output in spatial order: [B, *grid, C], or with a mask [B, K, *unit, C].
        """
        units = self.units_shape(x.shape[2:])
        ids_keep = None
        if mask is not None:
            len_keep = count_kept_units(mask, (x.shape[0], math.prod(units)))
            ids_keep, _, _ = functional.random_masking((~mask).float(), len_keep)
        outputs = self.forward_stages(x, ids_keep)
        out = outputs[-1]
        if mask is None:
            out = self.head(self.norm(out.mean(1)))
        if not return_intermediates:
            return out
        intermediates = []
        for layout, tokens in zip(self.layouts, outputs, strict=True):
            if mask is None:
                grid = tuple(n * u for n, u in zip(units, layout.shape, strict=True))
                intermediates.append(layout.reroll(tokens, grid))
            else:
                tokens = tokens.unflatten(1, (len_keep, -1))
                spatial = layout.reroll(tokens.flatten(0, 1), layout.shape)
                intermediates.append(spatial.unflatten(0, tokens.shape[:2]))
        return out, intermediates


def count_kept_units(mask: Tensor, shape: tuple[int, int]) -> int:
    """Units that every row of `mask` keeps; TypeError or ValueError if it is no mask of `shape`."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True keeps a unit), got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {list(shape)}, got {list(mask.shape)}")
    fewest, most = mask.sum(1).aminmax()
    if fewest != most or most == 0:
        raise ValueError(
            "mask must keep the same number of units in every row, at least 1;"
            f" got {fewest} to {most}"
        )
    return int(most)


def _check_sizes(input_size: Sequence[int], sizes: dict[str, Sequence[int]]) -> list[tuple]:
    """`sizes` as tuples; ValueError unless all have the length of input_size and fit together."""
    num_dims = len(input_size)
    if num_dims not in (2, 3):
        raise ValueError(f"input_size must be (H, W) or (T, H, W), got {tuple(input_size)}")
    for name, size in sizes.items():
        if len(size) != num_dims:
            raise ValueError(
                f"{name} must have {num_dims} entries as input_size has, got {tuple(size)}"
            )
    kernel, stride, padding = (
        sizes[name] for name in ("patch_kernel", "patch_stride", "patch_padding")
    )
    if any(not k - s <= 2 * p < k for k, s, p in zip(kernel, stride, padding, strict=True)):
        raise ValueError(
            "patch_kernel - patch_stride <= 2 * patch_padding < patch_kernel must hold, one token"
            f" per stride; got {tuple(kernel)}, {tuple(stride)} and {tuple(padding)}"
        )
    return [tuple(size) for size in sizes.values()]


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


# Widths and depths of the released models, and what their video versions change.
WIDTHS = {
    "tiny": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 7, 2)},
    "small": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 11, 2)},
    "base": {"embed_dim": 96, "num_heads": 1, "stages": (2, 3, 16, 3)},
    "base_plus": {"embed_dim": 112, "num_heads": 2, "stages": (2, 3, 16, 3)},
    "large": {"embed_dim": 144, "num_heads": 2, "stages": (2, 6, 36, 4)},
    "huge": {"embed_dim": 256, "num_heads": 4, "stages": (2, 6, 36, 4)},
}
VIDEO = {
    "input_size": (16, 224, 224),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
    "sep_pos_embed": True,
}


def HieraT(**kwargs) -> Hiera:
    """Hiera-T, 28 M parameters. Keywords as Hiera, for all factories."""
    return Hiera(**WIDTHS["tiny"] | kwargs)


def HieraS(**kwargs) -> Hiera:
    """Hiera-S, 35 M parameters."""
    return Hiera(**WIDTHS["small"] | kwargs)


def HieraB(**kwargs) -> Hiera:
    """Hiera-B, 52 M parameters."""
    return Hiera(**WIDTHS["base"] | kwargs)


def HieraBPlus(**kwargs) -> Hiera:
    """Hiera-B+, 70 M parameters."""
    return Hiera(**WIDTHS["base_plus"] | kwargs)


def HieraL(**kwargs) -> Hiera:
    """Hiera-L, 214 M parameters."""
    return Hiera(**WIDTHS["large"] | kwargs)


def HieraH(**kwargs) -> Hiera:
    """Hiera-H, 673 M parameters."""
    return Hiera(**WIDTHS["huge"] | kwargs)


hiera_tiny_224, hiera_small_224 = HieraT, HieraS
hiera_base_224, hiera_base_plus_224 = HieraB, HieraBPlus
hiera_large_224, hiera_huge_224 = HieraL, HieraH


def hiera_base_16x224(**kwargs) -> Hiera:
    """Hiera-B for clips [B, 3, 16, 224, 224], with the 400 classes of Kinetics."""
    return Hiera(**VIDEO | {"num_classes": 400} | WIDTHS["base"] | kwargs)


def hiera_base_plus_16x224(**kwargs) -> Hiera:
    """Hiera-B+ for clips."""
    return hiera_base_16x224(**WIDTHS["base_plus"] | kwargs)


def hiera_large_16x224(**kwargs) -> Hiera:
    """Hiera-L for clips."""
    return hiera_base_16x224(**WIDTHS["large"] | kwargs)


def hiera_huge_16x224(**kwargs) -> Hiera:
    """Hiera-H for clips."""
    return hiera_base_16x224(**WIDTHS["huge"] | kwargs)
