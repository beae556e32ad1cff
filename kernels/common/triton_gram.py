"""The passes of common/gram.py in Triton. N rows, D features; matrices are contiguous rows.

A program owns a block of columns and walks down all rows, so that every sum has a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, cdiv


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N rows times BLOCK_D columns; `dot` sums CHUNK products per program."""

    BLOCK_N: int = 64
    BLOCK_D: int = 32
    CHUNK: int = 4096
    num_warps: int = 4


CONFIG = Config()


@triton.jit
def _gram_stats_kernel(
    z_ptr,  # [N, D]
    stats_ptr,  # [2, D] float32: means, centered sums of squares
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (d < D)[None, :]
        at = n.to(tl.int64)[:, None] * D + d[None, :]
        total += tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / N
    rest = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (d < D)[None, :]
        at = n.to(tl.int64)[:, None] * D + d[None, :]
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, z - mean[None, :], 0.0)
        rest += centered
        squares += centered * centered
    # What the rounded mean left over corrects both.
    left = tl.sum(rest, axis=0)
    tl.store(stats_ptr + d, mean + left / N, mask=d < D)
    square = tl.maximum(tl.sum(squares, axis=0) - left * left / N, 0.0)
    tl.store(stats_ptr + D + d, square, mask=d < D)


@triton.jit
def _gram_scale_kernel(
    z0_ptr,  # [N, D]
    z1_ptr,  # [N, D], unused unless TWO
    stats_ptr,  # [V, 2, D] float32
    y0_ptr,  # [N, D] float32
    y1_ptr,  # [N, D] float32, unused unless TWO
    cross_ptr,  # [D] float32, unused unless TWO
    N,
    D,
    inv_count,
    eps,
    TWO: tl.constexpr,
    SCALE: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    cross = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    mean0 = tl.load(stats_ptr + d, mask=d < D, other=0.0)
    square0 = tl.load(stats_ptr + D + d, mask=d < D, other=0.0)
    scale0 = 1.0 / tl.sqrt(square0 * inv_count + eps)
    mean1, scale1 = mean0, scale0
    if TWO:
        mean1 = tl.load(stats_ptr + 2 * D + d, mask=d < D, other=0.0)
        square1 = tl.load(stats_ptr + 3 * D + d, mask=d < D, other=0.0)
        scale1 = 1.0 / tl.sqrt(square1 * inv_count + eps)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (d < D)[None, :]
        at = n.to(tl.int64)[:, None] * D + d[None, :]
        y0 = tl.load(z0_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean0[None, :]
        if SCALE:
            y0 *= scale0[None, :]
        tl.store(y0_ptr + at, y0, mask=inside)
        if TWO:
            y1 = tl.load(z1_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean1[None, :]
            if SCALE:
                y1 *= scale1[None, :]
            tl.store(y1_ptr + at, y1, mask=inside)
            term = (y0 - y1) * (y0 - y1) if DIFFERENCES else y0 * y1
            cross += tl.where(inside, term, 0.0)
    if TWO:
        tl.store(cross_ptr + d, tl.sum(cross, axis=0), mask=d < D)


@triton.jit
def _gram_dots_kernel(
    p_ptr,  # [N, D] float32
    y_ptr,  # [N, D] float32
    dots_ptr,  # [D] float32
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < N)[:, None] & (d < D)[None, :]
        at = n.to(tl.int64)[:, None] * D + d[None, :]
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        total += p * tl.load(y_ptr + at, mask=inside, other=0.0)
    tl.store(dots_ptr + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def _gram_combine_kernel(
    p_ptr,  # [N, D] float32
    y_ptr,  # [N, D] float32
    other_ptr,  # [N, D] float32, unused unless TWO
    factors_ptr,  # [4, D] float32: r, k, b, c
    dots_ptr,  # [D] float32, unused unless PROJECT
    out_ptr,  # [N, D]
    N,
    D,
    project,
    TWO: tl.constexpr,
    PROJECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = (tl.program_id(0) // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < N)[:, None] & (d < D)[None, :]
    at = n.to(tl.int64)[:, None] * D + d[None, :]
    r = tl.load(factors_ptr + d, mask=d < D, other=0.0)
    k = tl.load(factors_ptr + D + d, mask=d < D, other=0.0)
    c = tl.load(factors_ptr + 3 * D + d, mask=d < D, other=0.0)
    if PROJECT:
        k -= r * tl.load(dots_ptr + d, mask=d < D, other=0.0) * project
    out = tl.load(p_ptr + at, mask=inside, other=0.0) * r[None, :]
    out += tl.load(y_ptr + at, mask=inside, other=0.0) * k[None, :] + c[None, :]
    if TWO:
        b = tl.load(factors_ptr + 2 * D + d, mask=d < D, other=0.0)
        out += tl.load(other_ptr + at, mask=inside, other=0.0) * b[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gram_dot_kernel(
    a_ptr,  # [size] float32
    b_ptr,  # [size] float32
    parts_ptr,  # [chunks] float32
    size,
    CHUNK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    a = tl.load(a_ptr + i, mask=i < size, other=0.0)
    b = tl.load(b_ptr + i, mask=i < size, other=0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(a * b, axis=0))


_TILES = {"BLOCK_N": CONFIG.BLOCK_N, "BLOCK_D": CONFIG.BLOCK_D, "num_warps": CONFIG.num_warps}


def _column_blocks(width: int) -> int:
    return cdiv(width, CONFIG.BLOCK_D)


def stats(views: list[Tensor]) -> Tensor:  # [V, 2, D]
    """Mean and centered sum of squares of every column."""
    rows, width = views[0].shape
    out = views[0].new_empty((len(views), 2, width), dtype=torch.float32)
    for z, to in zip(views, out, strict=True):
        _gram_stats_kernel[(_column_blocks(width),)](z, to, rows, width, **_TILES)
    return out


def columns(
    views: list[Tensor],  # [n, D]
    known: Tensor | None,  # [V, 2, D], of the whole batch
    count: int,  # rows of the whole batch
    eps: float,  # negative: columns are centered only
    differences: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """stats [V, 2, D], y of every view, and per column the sum of y0 * y1 or (y0 - y1)^2."""
    rows, width = views[0].shape
    found = stats(views) if known is None else known.contiguous()
    ys = [torch.empty_like(z, dtype=torch.float32) for z in views]
    cross = torch.zeros_like(found[0, 0])
    _gram_scale_kernel[(_column_blocks(width),)](
        *(views[0], views[-1], found, ys[0], ys[-1], cross, rows, width),
        *(1.0 / count, max(eps, 1e-30)),
        TWO=len(views) == 2,
        SCALE=eps >= 0,
        DIFFERENCES=differences,
        **_TILES,
    )
    return found, ys, cross


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b."""
    parts = a.new_empty((cdiv(a.numel(), CONFIG.CHUNK),))
    _gram_dot_kernel[(parts.numel(),)](
        a, b, parts, a.numel(), CHUNK=CONFIG.CHUNK, num_warps=CONFIG.num_warps
    )
    return parts.sum(dtype=torch.float64).float()


def dots(p: Tensor, y: Tensor) -> Tensor:  # [n, D] -> [D]
    """Sum of p * y in every column."""
    rows, width = p.shape
    out = torch.empty_like(p[0])
    _gram_dots_kernel[(_column_blocks(width),)](p, y, out, rows, width, **_TILES)
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
    rows, width = p.shape
    products = dots(p, y) if project else factors
    out = p if dtype == torch.float32 else torch.empty_like(p, dtype=dtype)
    _gram_combine_kernel[(_column_blocks(width) * cdiv(rows, CONFIG.BLOCK_N),)](
        *(p, y, y if other is None else other, factors, products, out, rows, width, project),
        TWO=other is not None,
        PROJECT=bool(project),
        **_TILES,
    )
    return out


def aot_cases(views: int, crossed: bool) -> list[AotCase]:
    """Both directions of a loss on bf16 features."""
    tiles = {"BLOCK_N": CONFIG.BLOCK_N, "BLOCK_D": CONFIG.BLOCK_D}
    sizes = {"N": "i32", "D": "i32"}
    variant = "crossed" if crossed else f"{views}_views"
    flags = {"TWO": views == 2, "SCALE": crossed, "DIFFERENCES": not crossed, **tiles}
    scale = {"z0_ptr": "*bf16", "z1_ptr": "*bf16", "inv_count": "fp32", "eps": "fp32", **sizes}
    scale |= dict.fromkeys(("stats_ptr", "y0_ptr", "y1_ptr", "cross_ptr"), "*fp32")
    combine = dict.fromkeys(("p_ptr", "y_ptr", "other_ptr", "factors_ptr", "dots_ptr"), "*fp32")
    combine |= {"out_ptr": "*bf16", "project": "fp32", **sizes}
    cases = [
        (_gram_stats_kernel, {"z_ptr": "*bf16", "stats_ptr": "*fp32", **sizes}, tiles, ""),
        (_gram_scale_kernel, scale, flags, variant),
        (
            _gram_combine_kernel,
            combine,
            {"TWO": views == 2, "PROJECT": crossed, **tiles},
            variant,
        ),
        (
            _gram_dot_kernel,
            {"a_ptr": "*fp32", "b_ptr": "*fp32", "parts_ptr": "*fp32", "size": "i64"},
            {"CHUNK": CONFIG.CHUNK},
            "",
        ),
    ]
    if crossed:
        signature = dict.fromkeys(("p_ptr", "y_ptr", "dots_ptr"), "*fp32") | sizes
        cases.append((_gram_dots_kernel, signature, tiles, ""))
    return [
        AotCase(kernel, signature, constexprs, CONFIG.num_warps, variant=name)
        for kernel, signature, constexprs, name in cases
    ]
