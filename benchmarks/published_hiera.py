"""Hiera and its masked autoencoder in plain torch, as published (arXiv:2306.00989): a rival.

Tokens in the order of repeated splits, so that a pooling takes the maximum over a slow dimension;
attention by torch's scaled_dot_product_attention with the mask units in a dimension of their own;
removed pixels are 0, and removed units dropped by a boolean index after the embedding. Keys are the
official ones.

B images, U mask units, K of them kept, N tokens, C channels, D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.published_distillation import Mlp

Q, PATCH_STRIDE, NUM_SPLITS = 2, 4, 3
UNIT = Q**NUM_SPLITS  # tokens along a mask unit's side, at first


class Attention(nn.Module):
    """Of a stride's pooled queries within each of N / (stride * window) units, or of all tokens."""

    def __init__(self, dim: int, dim_out: int, num_heads: int, stride: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.stride, self.window = num_heads, stride, window
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        B, N, _ = x.shape
        units = N // (self.stride * self.window) if self.window else 1
        qkv = self.qkv(x).reshape(
            B, -1, units, 3, self.num_heads, self.proj.in_features // self.num_heads
        )
        q, k, v = qkv.permute(3, 0, 4, 2, 1, 5)  # each [B, heads, units, tokens, channels]
        if self.stride > 1:
            q = q.unflatten(3, (self.stride, -1)).max(3).values
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 3).reshape(B, -1, self.proj.in_features))


class Block(nn.Module):
    def __init__(
        self, dim: int, dim_out: int, num_heads: int, stride: int = 1, window: int = 0
    ) -> None:
        super().__init__()
        self.stride = stride
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, dim_out, num_heads, stride, window)
        self.norm2, self.mlp = nn.LayerNorm(dim_out, eps=1e-6), Mlp(dim_out)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        if self.proj is not None:
            x = self.proj(normed)
            if self.stride > 1:
                x = x.unflatten(1, (self.stride, -1)).max(1).values
        x = x + self.attn(normed)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 7, PATCH_STRIDE, 3)

    def forward(self, images: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, C]
        if mask is not None:
            # The convolution would see removed pixels.
            images = images * functional.interpolate(mask, images.shape[2:])
        return self.proj(images).flatten(2).transpose(1, 2)


class Hiera(nn.Module):
    """Images [B, 3, H, W] to the last stage's tokens, or to features [B, D]."""

    def __init__(
        self,
        side: int,
        embed_dim: int,
        num_heads: int,
        stages: Sequence[int],
        q_pool: int = 3,
    ) -> None:
        super().__init__()
        self.grid, self.q_pool, self.stages = side // PATCH_STRIDE, q_pool, stages
        self.patch_embed = PatchEmbed(embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, embed_dim))
        self.blocks = nn.ModuleList()
        dim, tokens = embed_dim, UNIT**2
        for stage, depth in enumerate(stages):
            width = embed_dim << stage
            for i in range(depth):
                # The first block of a stage attends as the stage before.
                first = stage > 0 and i == 0
                pools = first and stage <= q_pool
                tokens = tokens // Q**2 if pools else tokens
                has_units = stage < 2 or (first and stage == 2)
                window = tokens if has_units else 0
                stride = Q**2 if pools else 1
                self.blocks.append(Block(dim, width, num_heads << stage, stride, window))
                dim = width
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def unroll(self, x: Tensor) -> Tensor:
        """[B, N, C] of the grid from row-major order to that of repeated splits, finest first."""
        B, N, C = x.shape
        x = x.view(B, self.grid, self.grid, C)
        for _ in range(NUM_SPLITS):
            x = x.unflatten(2, (-1, Q)).unflatten(1, (-1, Q))  # [B, h, Q, w, Q, C]
            x = x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return x.reshape(B, N, C)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Each stage's tokens [B, N, C], of the kept units of `mask` [B, U] only."""
        units, as_image = self.grid // UNIT, None
        if mask is not None:
            as_image = mask.view(-1, 1, units, units).to(images.dtype)
        x = self.unroll(self.patch_embed(images, as_image) + self.pos_embed)
        if mask is not None:
            x = x[mask[:, None, :, None].expand(-1, UNIT**2, -1, x.shape[2]).flatten(1, 2)]
            x = x.view(len(images), -1, self.pos_embed.shape[2])
        found, blocks = [], iter(self.blocks)
        for depth in self.stages:
            for _ in range(depth):
                x = next(blocks)(x)
            found.append(x)
        return found

    def features(self, images: Tensor) -> Tensor:
        return self.norm(self.encode(images)[-1].mean(1))


class MaskedAutoencoder(Hiera):
    """Images [B, 3, H, W] and noise [B, U] to (loss,): the released models pool twice."""

    def __init__(
        self,
        side: int,
        embed_dim: int,
        num_heads: int,
        stages: Sequence[int],
        decoder: tuple[int, int, int],  # width, blocks, heads
        mask_ratio: float = 0.6,
    ) -> None:
        super().__init__(side, embed_dim, num_heads, stages, q_pool=2)
        width, depth, heads = decoder
        self.mask_ratio, dim = mask_ratio, self.norm.normalized_shape[0]
        self.encoder_norm = self.norm
        del self.norm
        self.multi_scale_fusion_heads = nn.ModuleList(
            nn.Conv2d(embed_dim << stage, dim, size, size) for stage, size in enumerate((Q**2, Q))
        )
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.final = self.grid // Q**2
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.final**2, width))
        self.decoder_blocks = nn.ModuleList(Block(width, width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.patch = PATCH_STRIDE * Q**2
        self.decoder_pred = nn.Linear(width, 3 * self.patch**2)

    def reroll(self, x: Tensor, num_splits: int) -> Tensor:
        """[B, N, C] in the order of splits -> [B, K, h, w, C]."""
        B, N, C = x.shape
        sides = (1, 1)
        for _ in range(num_splits):
            N //= Q**2
            x = x.view(B, Q, Q, N, *sides, C).permute(0, 3, 1, 4, 2, 5, 6)
            sides = (Q * sides[0], Q * sides[1])
            x = x.reshape(B, N, *sides, C)
        return x.view(B, N, *sides, C)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor]:
        B, U = noise.shape
        kept = int(U * (1 - self.mask_ratio))
        mask = torch.zeros(B, U, device=noise.device)
        mask.scatter_(1, noise.argsort(1)[:, :kept], 1)
        mask = mask.bool()
        stages = self.encode(images, mask)
        x = self.reroll(stages[-1], NUM_SPLITS - self.q_pool)  # [B, K, 2, 2, D]
        for i, head in enumerate(self.multi_scale_fusion_heads):
            early = self.reroll(stages[i], NUM_SPLITS - i).flatten(0, 1)
            x = x + head(early.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).view(x.shape)
        x = self.decoder_embed(self.encoder_norm(x))
        seen = mask[:, :, None, None, None].expand(-1, -1, *x.shape[2:])
        full = torch.zeros(seen.shape, device=x.device, dtype=x.dtype)
        full[seen] = x.flatten()
        full = torch.where(seen, full, self.mask_token.to(x.dtype))
        side = int(U**0.5)
        visible = mask.view(B, side, side)
        visible = visible.repeat_interleave(Q, 1).repeat_interleave(Q, 2).flatten(1)
        x = full.view(B, side, side, Q, Q, -1).transpose(2, 3).reshape(B, self.final**2, -1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[~visible]
        label = functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)[~visible]
        mean, var = label.mean(-1, keepdim=True), label.var(-1, keepdim=True)
        return (((pred - (label - mean) / (var + 1e-6).sqrt()) ** 2).mean(),)
