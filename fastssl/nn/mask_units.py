"""Mask units: the order of their tokens, and attention within them (Hiera, arXiv:2306.00989).

B images, U mask units in an image, u tokens in a unit, N = U * u, C channels, H heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import functional
from fastssl.nn.block import NormLayer
from fastssl.nn.drop_path import DropPath, columns
from fastssl.nn.linear import Linear
from fastssl.nn.mlp import Mlp
from fastssl.nn.norm import add_layer_norm, layer_norm
from fastssl.nn.sdpa import self_attention


@dataclass(frozen=True)
class UnitLayout:
    """The order of tokens when mask units lie one behind the other: [B, U * u, C].

    Units are in row-major order of the image. In a unit of `shape` tokens, those that one query
    pooling merges stand a fixed distance apart: the slowest local index runs over the
    prod(q_stride) members of the first pooling's groups, the next over those of the second, and so
    on for `num_pools`; what remains is in row-major order. So a pooling is a maximum over one axis
    of a view, [B, U, prod(q_stride), rest, C], and its result has the layout `pooled()`.

    Raises ValueError if the poolings do not divide `shape`.
    """

    shape: tuple[int, ...]
    q_stride: tuple[int, ...]
    num_pools: int

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.q_stride):
            raise ValueError(
                f"mask_unit_size and q_stride must have the same length, got {self.shape} and"
                f" {self.q_stride}"
            )
        if any(s % q**self.num_pools for s, q in zip(self.shape, self.q_stride, strict=True)):
            raise ValueError(
                f"mask_unit_size must be divisible by q_stride ** {self.num_pools} ="
                f" {tuple(q**self.num_pools for q in self.q_stride)}, got {self.shape}"
            )

    @property
    def num_tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def final_shape(self) -> tuple[int, ...]:
        """Tokens of a unit along each dimension after all poolings."""
        return tuple(s // q**self.num_pools for s, q in zip(self.shape, self.q_stride, strict=True))

    @property
    def order(self) -> tuple[int, ...]:
        """For each position in the unit, the row-major index of the token that stands there."""
        index = torch.arange(self.num_tokens, device="cpu").view(1, *self.shape, 1)
        return tuple(self.unroll(index).flatten().tolist())

    def pooled(self) -> "UnitLayout":
        shape = tuple(s // q for s, q in zip(self.shape, self.q_stride, strict=True))
        return UnitLayout(shape, self.q_stride, self.num_pools - 1)

    def unroll(self, x: Tensor) -> Tensor:
        """[B, *grid, C] -> [B, N, C]; the unit's shape divides the grid."""
        sizes, axes = self._axes(x.shape[1:-1])
        x = x.reshape(x.shape[0], *sizes, x.shape[-1])
        return x.permute(0, *axes, x.dim() - 1).flatten(1, -2)

    def reroll(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, N, C] -> [B, *grid, C], the inverse of `unroll`."""
        sizes, axes = self._axes(grid)
        x = x.reshape(x.shape[0], *(sizes[axis - 1] for axis in axes), x.shape[-1])
        inverse = sorted(range(len(axes)), key=axes.__getitem__)
        x = x.permute(0, *(axis + 1 for axis in inverse), x.dim() - 1)
        return x.reshape(x.shape[0], *grid, x.shape[-1])

    def _axes(self, grid: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """How `unroll` splits a grid, as sizes in row-major order, and in which order it reads it.

        Each dimension is (unit, rest, group of the last pooling, ..., group of the first).
        """
        per_dim = 2 + self.num_pools
        sizes: list[int] = []
        for size, unit, final, stride in zip(
            grid, self.shape, self.final_shape, self.q_stride, strict=True
        ):
            sizes += [size // unit, final, *[stride] * self.num_pools]
        reading_order = (0, *range(per_dim - 1, 0, -1))
        axes = [1 + dim * per_dim + part for part in reading_order for dim in range(len(grid))]
        return sizes, axes


class MaskUnitAttention(nn.Module):
    """Self-attention within mask units or global, optionally pooling the queries.

    [B, N, dim] -> [B, N / q_stride, dim_out], tokens in the order of `UnitLayout`. `q_stride` is
    the flattened pooling stride (2 x 2 = 4) and `window_size` the number of a unit's tokens AFTER
    pooling. Keys: qkv, proj.

    `forward` may name the rows of the result that are wanted, `ids` [B, K], with `ids_restore` as
    of `functional.masked_gather`: [B, K, dim_out].
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        q_stride: int = 1,
        window_size: int = 0,
        use_mask_unit_attn: bool = False,
    ) -> None:
        super().__init__()
        if dim_out % heads:
            raise ValueError(f"dim_out must be divisible by heads={heads}, got {dim_out}")
        if window_size < 1 and (use_mask_unit_attn or q_stride > 1):
            raise ValueError(
                f"window_size must be positive for mask unit attention and for query pooling,"
                f" got {window_size}"
            )
        self.heads = heads
        self.q_stride = q_stride
        self.window_size = window_size
        self.use_mask_unit_attn = use_mask_unit_attn
        self.qkv = Linear(dim, 3 * dim_out)
        self.proj = Linear(dim_out, dim_out)

    def forward(
        self, x: Tensor, ids: Tensor | None = None, ids_restore: Tensor | None = None
    ) -> Tensor:
        unit_size = self.q_stride * self.window_size if self.use_mask_unit_attn else None
        qkv, q_stride = self.qkv(x), self.q_stride
        if q_stride > 1 and unit_size is None:
            # Pooling groups are spread over their unit; here the image must be the unit. The order
            # of keys does not matter.
            groups = qkv.unflatten(1, (-1, q_stride, self.window_size))
            qkv = groups.transpose(1, 2).flatten(1, 3)
        x = self_attention(qkv, self.heads, unit_size=unit_size, q_stride=q_stride)
        return self.proj(_wanted(x, ids, ids_restore))


def _wanted(x: Tensor, ids: Tensor | None, ids_restore: Tensor | None) -> Tensor:
    return x if ids is None else functional.masked_gather(x, ids, ids_restore=ids_restore)


class HieraBlock(nn.Module):
    """Pre-norm transformer block: [B, N, dim] -> [B, N / q_stride, dim_out].

    Where the width changes, the residual is a projection of the normed input; with `q_stride` > 1
    it is pooled as the queries are. Arguments as MaskUnitAttention, those of `forward` too: all
    tokens attend and are attended to; the projection behind it, norm2 and the MLP are computed for
    the wanted ones. `drops` [B, 2] decide what is dropped, see `DropPath`. Keys: norm1, attn,
    norm2, mlp, proj.
    """

    num_drops = 2

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        q_stride: int = 1,
        window_size: int = 0,
        use_mask_unit_attn: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = MaskUnitAttention(
            dim, dim_out, heads, q_stride, window_size, use_mask_unit_attn
        )
        self.norm2 = norm_layer(dim_out)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio), act_layer=act_layer)
        self.drop_path = DropPath(drop_path)
        self.proj = Linear(dim, dim_out) if dim != dim_out else None

    def forward(
        self,
        x: Tensor,
        ids: Tensor | None = None,
        ids_restore: Tensor | None = None,
        *,
        drops: Tensor | None = None,
    ) -> Tensor:
        x_norm = layer_norm(self.norm1, x)
        if self.proj is not None:
            x = self.proj(x_norm)
        q_stride = self.attn.q_stride
        if q_stride > 1:
            unit_size = q_stride * self.attn.window_size
            x = functional.mask_unit_pool(x, unit_size=unit_size, q_stride=q_stride)
        drop_path, (first, second) = self.drop_path, columns(drops, self.num_drops)
        if drop_path.num_kept(x.shape[0]) < x.shape[0]:
            x = drop_path.add_branch(x, x_norm, self.attn, first)
            x = _wanted(x, ids, ids_restore)
            return drop_path.add_branch(x, x, self._feed_forward, second)
        x, y = _wanted(x, ids, ids_restore), self.attn(x_norm, ids, ids_restore)
        x, y = add_layer_norm(self.norm2, x, y, scale=drop_path.draw(x, first))
        return x + drop_path(self.mlp(y), second)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(layer_norm(self.norm2, x))
