"""Cross-covariance image transformer, with the state-dict keys of the released weights.

B images, H heads, D = H * d channels, h x w patches, N = h * w of them.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.models.hub import HubModel
from fastssl.models.norm_names import norm_layer_of
from fastssl.models.resnet import BatchNormCheckpointing
from fastssl.nn import LAYER_NORM, DropPath, Linear, Mlp, NormLayer
from fastssl.nn.drop_path import columns
from fastssl.nn.norm import add_layer_norm, layer_norm
from fastssl.nn.sdpa import attend


class FourierPosition(nn.Module):
    """Sines and cosines of each patch's row and column, projected: (h, w) -> [1, h, w, D].

    Rows and columns are counted from 1 and scaled so that the last one is at 2 pi: every size of
    grid spans the same angles. Key: token_projection, a 1x1 convolution.
    """

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10_000.0) -> None:
        super().__init__()
        self.hidden_dim, self.temperature = hidden_dim, temperature
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, 1)

    def _waves(self, length: int) -> Tensor:
        """[length, hidden_dim]: sin, cos, sin, cos, ... from the highest frequency down."""
        device = self.token_projection.weight.device
        position = torch.arange(1, length + 1, device=device) * (2 * math.pi / (length + 1e-6))
        exponent = torch.arange(0, self.hidden_dim, 2, device=device) / self.hidden_dim
        angle = position[:, None] / self.temperature**exponent
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        rows, columns = (self._waves(length).T for length in grid)
        waves = torch.cat([rows[:, :, None].expand(-1, *grid), columns[:, None].expand(-1, *grid)])
        # Added to the patches, this keeps the residual stream wide under autocast.
        dtype = self.token_projection.weight.dtype
        return self.token_projection(waves[None].to(dtype)).permute(0, 2, 3, 1).to(dtype)


class ConvPatchEmbed(nn.Module):
    """3x3 convolutions of stride 2, each with a BatchNorm, GELU between: [B, C, H, W] ->
    [B, H / patch, W / patch, D].

    There are log2(patch_size) of them, each twice as wide as the one before. Key: proj.
    ValueError for a size that the patch does not divide.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        depth = patch_size.bit_length() - 1
        if depth < 1 or patch_size != 2**depth:
            raise ValueError(f"patch_size must be a power of 2 from 2 on, got {patch_size}")
        if embed_dim % 2 ** (depth - 1):
            raise ValueError(f"embed_dim must be divisible by {2 ** (depth - 1)}, got {embed_dim}")
        self.in_chans, self.patch_size = in_chans, patch_size
        widths = [in_chans, *(embed_dim >> i for i in reversed(range(depth)))]
        self.proj = nn.Sequential()
        for i in range(depth):
            if i > 0:
                self.proj.append(nn.GELU())
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1, bias=False)
            self.proj.append(nn.Sequential(conv, nn.BatchNorm2d(widths[i + 1])))

    def grid_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Patches along each side of an image of `size`; ValueError as above."""
        patch = self.patch_size
        if len(size) != 2 or any(side < 1 or side % patch for side in size):
            raise ValueError(
                f"the image size must be divisible by {patch} x {patch},"
                f" got {' x '.join(map(str, size))}"
            )
        return tuple(side // patch for side in size)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images must have shape [B, {self.in_chans}, H, W], got {list(images.shape)}"
            )
        self.grid_size(images.shape[2:])
        return self.proj(images).permute(0, 2, 3, 1)


class CrossCovarianceAttention(nn.Module):
    """Attention of channels to channels, linear in N: [B, N, D] -> [B, N, D].

    Within a head, channels are normalised over the tokens and their d x d products, times a learned
    temperature, are the scores. Keys: temperature, qkv, proj.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3 D] -> three of [B, H, d, N]
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 4, 1)
        q, k = F.normalize(q, dim=3), F.normalize(k, dim=3)
        weights = (q @ k.transpose(2, 3) * self.temperature).softmax(dim=3).to(v.dtype)
        return self.proj((weights @ v).permute(0, 3, 1, 2).flatten(2))


class LocalPatchInteraction(nn.Module):
    """Two depth-wise 3x3 convolutions over the patches, GELU and BatchNorm between:
    [B, h, w, D] -> [B, h, w, D]. Keys: conv1, bn, conv2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv1(x.permute(0, 3, 1, 2)))
        return self.conv2(self.bn(x)).permute(0, 2, 3, 1)


class XCABlock(nn.Module):
    """Residual cross-covariance attention, local patch interaction and Mlp, each behind a LayerNorm
    and with a LayerScale that starts at `eta`: [B, h, w, D] -> [B, h, w, D].

    `drops` [B, 3] decide what is dropped, see `DropPath`. Keys: norm1, attn, gamma1; norm3,
    local_mp, gamma3; norm2, mlp, gamma2.
    """

    num_drops = 3

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        eta: float,
        drop_path: float,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        self.eta = eta
        self.norm1 = norm_layer(dim)
        self.attn = CrossCovarianceAttention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = norm_layer(dim)
        self.local_mp = LocalPatchInteraction(dim)
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.empty(dim)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for gamma in (self.gamma1, self.gamma2, self.gamma3):
            nn.init.constant_(gamma, self.eta)

    def forward(self, x: Tensor, *, drops: Tensor | None = None) -> Tensor:
        # Branches of dropped samples are computed, as BatchNorm's statistics are of all samples.
        draw, (first, second, third) = self.drop_path.draw, columns(drops, self.num_drops)
        branch = self.attn(layer_norm(self.norm1, x).flatten(1, 2)).view_as(x)
        x, y = add_layer_norm(self.norm3, x, branch, gamma=self.gamma1, scale=draw(x, first))
        branch = self.local_mp(y)
        x, y = add_layer_norm(self.norm2, x, branch, gamma=self.gamma3, scale=draw(x, second))
        return x + self.drop_path(self.gamma2 * self.mlp(y), third)


class ClassAttention(nn.Module):
    """Attention of the class token, the first, to all: [B, 1 + N, D] -> [B, 1, D]. Keys: qkv, proj.

    CaiT (Touvron et al., 2021, arXiv:2103.17239).
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B, 1 + N, 3 D] -> three of [B, H, 1 + N, d]
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attend(q[:, :, :1], k, v).transpose(1, 2).flatten(2))


class ClassAttentionBlock(nn.Module):
    """Class attention and an Mlp of the class token: [B, 1 + N, D] -> [B, 1 + N, D].

    Patch tokens are changed too, as in the released models: gamma1 * norm1 is added to them, then,
    normed with `tokens_norm`, they are doubled, because the second branch returns them as they are.
    Keys: norm1, attn, gamma1, norm2, mlp, gamma2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        eta: float,
        tokens_norm: bool,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        self.eta, self.tokens_norm = eta, tokens_norm
        self.norm1 = norm_layer(dim)
        self.attn = ClassAttention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for gamma in (self.gamma1, self.gamma2):
            nn.init.constant_(gamma, self.eta)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(y), y[:, 1:]], dim=1)
        if self.tokens_norm:
            x = self.norm2(x)
        cls_token, patches = x[:, :1], x[:, 1:]
        if not self.tokens_norm:
            cls_token = self.norm2(cls_token)
        return torch.cat([cls_token + self.gamma2 * self.mlp(cls_token), 2 * patches], dim=1)


class XCiT(nn.Module, BatchNormCheckpointing, HubModel):
    """Cross-covariance image transformer (El-Nouby et al., 2021, arXiv:2106.09681).

    Images of any size that `patch_size`, a power of two, divides; the released models have 16
    or 8. `depth` XCABlocks are followed by `cls_attn_layers` blocks of class attention. LayerScale
    starts at `eta`. `tokens_norm` norms patch tokens in the latter blocks, too: all released models
    but the nano ones. `drop_path_rate` is that of every XCABlock. `num_classes=0` leaves the
    classifier out.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        cls_attn_layers: int = 2,
        eta: float = 1.0,
        tokens_norm: bool = True,
        norm_layer: str | NormLayer = LAYER_NORM,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer_of(norm_layer)
        self.embed_dim = self.num_features = embed_dim
        self.patch_size = (patch_size, patch_size)
        self.num_prefix_tokens = 1
        self.patch_embed = ConvPatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_embeder = FourierPosition(embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        sizes = (embed_dim, num_heads, mlp_ratio, qkv_bias, eta)
        self.blocks = nn.ModuleList(
            XCABlock(*sizes, drop_path_rate, norm_layer) for _ in range(depth)
        )
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(*sizes, tokens_norm, norm_layer) for _ in range(cls_attn_layers)
        )
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Random initialisation as in the official code; to be called again after `to_empty`."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normed tokens [B, 1 + N, D] of images [B, C, H, W]: class token, then patches by row."""
        x = self.patch_embed(images)
        x = x + self.pos_embeder(x.shape[1:3])
        for block in self.blocks:
            x = self.run_block(block, x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        for block in self.cls_attn_blocks:
            x = self.run_block(block, x)
        return self.norm(x)

    def features(self, images: Tensor) -> Tensor:
        """Image features [B, D]: the normed class token."""
        return self.forward_features(images)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """head(features): [B, num_classes], or [B, D] where `num_classes` is 0."""
        return self.head(self.features(images))


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"dim must be divisible by num_heads={num_heads}, got {dim}")


def xcit_nano_12(patch_size: int = 16, **kwargs) -> XCiT:
    """XCiT-N12: D = 128, 4 heads. Keywords as XCiT, for all factories."""
    config = {"embed_dim": 128, "depth": 12, "num_heads": 4, "tokens_norm": False}
    return XCiT(**config | {"patch_size": patch_size} | kwargs)


def xcit_tiny_12(patch_size: int = 16, **kwargs) -> XCiT:
    """XCiT-T12: D = 192, 4 heads."""
    config = {"embed_dim": 192, "depth": 12, "num_heads": 4}
    return XCiT(**config | {"patch_size": patch_size} | kwargs)


def xcit_small_12(patch_size: int = 16, **kwargs) -> XCiT:
    """XCiT-S12: D = 384, 8 heads."""
    config = {"embed_dim": 384, "depth": 12, "num_heads": 8}
    return XCiT(**config | {"patch_size": patch_size} | kwargs)


def xcit_small_24(patch_size: int = 16, **kwargs) -> XCiT:
    """XCiT-S24: D = 384, 8 heads, LayerScale from 1e-5 as in all models of 24 blocks."""
    config = {"embed_dim": 384, "depth": 24, "num_heads": 8, "eta": 1e-5}
    return XCiT(**config | {"patch_size": patch_size} | kwargs)


def xcit_medium_24(patch_size: int = 16, **kwargs) -> XCiT:
    """XCiT-M24: D = 512, 8 heads."""
    config = {"embed_dim": 512, "depth": 24, "num_heads": 8, "eta": 1e-5}
    return XCiT(**config | {"patch_size": patch_size} | kwargs)


xcit_small_12_p16 = partial(xcit_small_12, patch_size=16)
xcit_small_12_p8 = partial(xcit_small_12, patch_size=8)
xcit_medium_24_p16 = partial(xcit_medium_24, patch_size=16)
xcit_medium_24_p8 = partial(xcit_medium_24, patch_size=8)
