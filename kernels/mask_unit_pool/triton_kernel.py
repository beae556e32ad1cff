"""mask_unit_pool in Triton. R rows (tokens) of the result, C channels."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Tile of one program: BLOCK_R pooled tokens times BLOCK_C channels."""

    BLOCK_R: int = 8
    BLOCK_C: int = 128
    num_warps: int = 4


CONFIG = Config()


@triton.jit
def _tile(R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of this program's tile, and which of its elements exist."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return rows, columns[None, :], (rows < R)[:, None] & (columns < C)[None, :]


@triton.jit
def _first_members(rows, columns, pooled_size, C, Q_STRIDE: tl.constexpr):
    """Offsets in x of the first member of each group."""
    tokens = rows // pooled_size * (pooled_size * Q_STRIDE) + rows % pooled_size
    return tokens[:, None] * C + columns


@triton.jit
def _mask_unit_pool_fwd_kernel(
    x_ptr,  # [R * Q_STRIDE, C]
    out_ptr,  # [R, C]
    argmax_ptr,  # [R, C] uint8, unused unless SAVES
    R,
    C,
    pooled_size,
    Q_STRIDE: tl.constexpr,
    SAVES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, columns, inside = _tile(R, C, BLOCK_R, BLOCK_C)
    first = _first_members(rows, columns, pooled_size, C, Q_STRIDE)
    # A cast, no method: Triton makes an argument of 1 a constant.
    step = tl.cast(pooled_size, tl.int64) * C
    best = tl.load(x_ptr + first, mask=inside, other=0.0)
    argmax = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    for r in range(1, Q_STRIDE):
        x = tl.load(x_ptr + first + r * step, mask=inside, other=0.0)
        value, top = x.to(tl.float32), best.to(tl.float32)
        # The first NaN stays: nothing is greater than it.
        better = (value > top) | ((value != value) & (top == top))
        best = tl.where(better, x, best)
        argmax = tl.where(better, r, argmax)
    to = rows[:, None] * C + columns
    tl.store(out_ptr + to, best, mask=inside)
    if SAVES:
        tl.store(argmax_ptr + to, argmax.to(tl.uint8), mask=inside)


@triton.jit
def _mask_unit_pool_bwd_kernel(
    dout_ptr,  # [R, C]
    argmax_ptr,  # [R, C] uint8
    dx_ptr,  # [R * Q_STRIDE, C]
    R,
    C,
    pooled_size,
    Q_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, columns, inside = _tile(R, C, BLOCK_R, BLOCK_C)
    first = _first_members(rows, columns, pooled_size, C, Q_STRIDE)
    # A cast, no method: Triton makes an argument of 1 a constant.
    step = tl.cast(pooled_size, tl.int64) * C
    source = rows[:, None] * C + columns
    dout = tl.load(dout_ptr + source, mask=inside, other=0.0)
    argmax = tl.load(argmax_ptr + source, mask=inside, other=0).to(tl.int32)
    for r in range(Q_STRIDE):
        dx = tl.where(argmax == r, dout, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + first + r * step, dx, mask=inside)


def _launch(pooled: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid over [R, C], and the tile."""
    dim = pooled.shape[2]
    block_c = min(CONFIG.BLOCK_C, next_power_of_2(dim))
    rows = pooled.shape[0] * pooled.shape[1]
    grid = cdiv(rows, CONFIG.BLOCK_R), cdiv(dim, block_c)
    return grid, {"BLOCK_R": CONFIG.BLOCK_R, "BLOCK_C": block_c, "num_warps": CONFIG.num_warps}


def mask_unit_pool_fwd(
    x: Tensor, unit_size: int, q_stride: int, out: Tensor, argmax: Tensor | None
) -> None:
    """Fill out [B, N / q_stride, C] and, where given, argmax; see __init__.py for the formula."""
    if out.numel() == 0:
        return
    grid, tile = _launch(out)
    _mask_unit_pool_fwd_kernel[grid](
        x,
        out,
        x if argmax is None else argmax,
        out.shape[0] * out.shape[1],
        out.shape[2],
        unit_size // q_stride,
        Q_STRIDE=q_stride,
        SAVES=argmax is not None,
        **tile,
    )


def mask_unit_pool_bwd(
    dout: Tensor, argmax: Tensor, unit_size: int, q_stride: int, dx: Tensor
) -> None:
    """Fill dx [B, N, C]."""
    if dout.numel() == 0:
        return
    grid, tile = _launch(dout)
    _mask_unit_pool_bwd_kernel[grid](
        dout,
        argmax,
        dx,
        dout.shape[0] * dout.shape[1],
        dout.shape[2],
        unit_size // q_stride,
        Q_STRIDE=q_stride,
        **tile,
    )


def aot_cases() -> list[AotCase]:
    """The bf16 poolings of an image Hiera, 2 x 2 tokens to one, and the longest groups."""
    tile = {"BLOCK_R": CONFIG.BLOCK_R, "BLOCK_C": CONFIG.BLOCK_C}
    sizes = {"R": "i32", "C": "i32", "pooled_size": "i32"}
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16", "argmax_ptr": "*u8"}
    pointers_bwd = {"dout_ptr": "*bf16", "argmax_ptr": "*u8", "dx_ptr": "*bf16"}
    cases = []
    for q_stride in (4, 64):
        constexprs = {"Q_STRIDE": q_stride, **tile}
        variant = f"q_stride_{q_stride}"
        cases += [
            AotCase(
                _mask_unit_pool_fwd_kernel,
                pointers | sizes,
                {"SAVES": True, **constexprs},
                CONFIG.num_warps,
                variant=variant,
            ),
            AotCase(
                _mask_unit_pool_bwd_kernel,
                pointers_bwd | sizes,
                constexprs,
                CONFIG.num_warps,
                variant=variant,
            ),
        ]
    return cases
