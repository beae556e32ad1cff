"""The passes of common/gram.py in C++: scratch memory and calls of csrc/cpu/gram.cpp."""

import torch
from torch import Tensor

# As in gram.cpp.
TILE_ELEMENTS = 65536
MIN_WIDTH, MAX_WIDTH = 16, 256
CHUNK = 16384


def _scratch(z: Tensor) -> Tensor:
    """Two float32 tiles of all rows for every thread that has enough to do."""
    rows, features = z.shape
    width = min(max(TILE_ELEMENTS // rows // MIN_WIDTH * MIN_WIDTH, MIN_WIDTH), MAX_WIDTH)
    workers = max(1, min(torch.get_num_threads(), -(-features // width), z.numel() // 8192))
    return z.new_empty((workers, 2 * rows * width), dtype=torch.float32)


def _columns(
    views: list[Tensor],
    known: bool,
    count: int,
    eps: float,
    differences: bool,
    stats: Tensor,
    ys: list[Tensor],
    cross: Tensor | None,
) -> None:
    second = views[1] if len(views) == 2 else None
    y0, y1 = (*ys, None, None)[:2]
    torch.ops.fastssl_csrc.gram_columns(
        *(views[0], second, known, count, eps, differences),
        *(_scratch(views[0]), stats, y0, y1, cross),
    )


def stats(views: list[Tensor]) -> Tensor:  # [V, 2, D]
    """Mean and centered sum of squares of every column."""
    out = views[0].new_empty((len(views), 2, views[0].shape[1]), dtype=torch.float32)
    _columns(views, False, 1, -1.0, False, out, [], None)
    return out


def columns(
    views: list[Tensor],  # [n, D]
    known: Tensor | None,  # [V, 2, D], of the whole batch
    count: int,  # rows of the whole batch
    eps: float,  # negative: columns are centered only
    differences: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """stats [V, 2, D], y of every view, and per column the sum of y0 * y1 or (y0 - y1)^2."""
    stats = known
    if known is None:
        stats = views[0].new_empty((len(views), 2, views[0].shape[1]), dtype=torch.float32)
    ys = [torch.empty_like(z, dtype=torch.float32) for z in views]
    cross = torch.zeros_like(stats[0, 0])
    _columns(views, known is not None, count, eps, differences, stats, ys, cross)
    return stats, ys, cross


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b."""
    out = a.new_empty(())
    parts = a.new_empty((-(-a.numel() // CHUNK),), dtype=torch.float64)
    torch.ops.fastssl_csrc.gram_dot(a, b, parts, out)
    return out


def dots(p: Tensor, y: Tensor) -> Tensor:  # [n, D] -> [D]
    """Sum of p * y in every column."""
    out = torch.empty_like(p[0])
    torch.ops.fastssl_csrc.gram_dots(p, y, out)
    return out


def combine(
    p: Tensor,  # [n, D]; may be overwritten
    y: Tensor,
    other: Tensor | None,
    factors: Tensor,  # [4, D]: r, k, b, c
    project: float,
    dtype: torch.dtype,
) -> Tensor:  # [n, D]
    """r p + (k - project r dots(p, y)) y + b other + c."""
    out = p if dtype == torch.float32 else torch.empty_like(p, dtype=dtype)
    torch.ops.fastssl_csrc.gram_combine(p, y, other, factors, project, out)
    return out
