"""Position embeddings of a token grid: fixed sine-cosine ones, and learned ones resampled."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed_2d(
    embed_dim: int, grid_size: tuple[int, int], num_prefix_tokens: int = 0
) -> Tensor:
    """Fixed sine-cosine embedding of a (rows, columns) grid: float32 [P + rows * columns, D].

    The first half of the channels encodes the column, the second half the row, each as
    [sin(c w_i), cos(c w_i)] with w_i = 10000^(-i / (D/4)): the order of the released MAE weights
    (He et al., 2021, arXiv:2111.06377). The P prefix tokens get zeros.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be divisible by 4, got {embed_dim}")
    rows, columns = grid_size
    quarter = embed_dim // 4
    omega = 10000.0 ** (torch.arange(quarter, dtype=torch.float64) / -quarter)

    def encode(coordinates: int) -> Tensor:  # [coordinates, D/2]
        angle = torch.outer(torch.arange(coordinates, dtype=torch.float64), omega)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row = encode(rows)[:, None].expand(-1, columns, -1)
    column = encode(columns)[None].expand(rows, -1, -1)
    grid = torch.cat([column, row], dim=2).flatten(0, 1)
    return F.pad(grid, (0, 0, num_prefix_tokens, 0)).float()


def interpolate_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, ...],
    new_grid: tuple[int, ...],
    num_prefix_tokens: int = 0,
    *,
    antialias: bool = False,
) -> Tensor:
    """Resample a position embedding [1, P + N, D] from `old_grid` (N tokens) to `new_grid`.

    A grid is (rows, columns), (frames,), or (frames, rows, columns): bicubic in space, cubic in
    time. The P prefix tokens stay. The target is given as a size, never as a scale factor, whose
    rounding can miss the grid by one. `antialias` is what DINOv2's register models use.
    """
    if pos_embed.dim() != 3 or pos_embed.shape[:2] != (1, num_prefix_tokens + math.prod(old_grid)):
        sides = " * ".join(map(str, old_grid))
        raise ValueError(
            f"pos_embed must have shape [1, {num_prefix_tokens} + {sides}, D],"
            f" got {list(pos_embed.shape)}"
        )
    if len(old_grid) != len(new_grid) or not 1 <= len(old_grid) <= 3:
        raise ValueError(
            f"new_grid must have as many dimensions as old_grid {tuple(old_grid)}, 1 to 3;"
            f" got {tuple(new_grid)}"
        )
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    prefix, x = pos_embed.tensor_split((num_prefix_tokens,), dim=1)
    x = x.float()
    if len(old_grid) > 1:
        x = x.unflatten(1, (-1, old_grid[-2] * old_grid[-1])).flatten(0, 1)  # frames as a batch
        x = _resample(x, old_grid[-2:], new_grid[-2:], antialias)
    if len(old_grid) != 2:
        x = x.reshape(1, old_grid[0], -1)  # places as channels
        x = _resample(x, (old_grid[0], 1), (new_grid[0], 1), antialias)
    x = x.reshape(1, -1, pos_embed.shape[2]).to(pos_embed.dtype)
    return torch.cat([prefix, x], dim=1)


def _resample(x: Tensor, old: tuple[int, ...], new: tuple[int, ...], antialias: bool) -> Tensor:
    """[B, h * w, D] -> [B, H * W, D]."""
    image = x.unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(new), mode="bicubic", antialias=antialias)
    return image.permute(0, 2, 3, 1).flatten(1, 2)
