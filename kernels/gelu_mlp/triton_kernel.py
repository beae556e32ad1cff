"""Bias and exact GELU between the products of gelu_mlp, in Triton. M rows, H hidden features."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_columns import num_slices, rows_per_slice, total
from fastssl.kernels.common.triton_utils import AotCase, cdiv


@dataclass(frozen=True)
class Config:
    """Tile of one program, in backward of one step of it: rows times columns."""

    BLOCK_M: int = 16
    BLOCK_H: int = 128
    num_warps: int = 4


CONFIG = Config()


@triton.jit
def _gelu_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@triton.jit
def _gelu_mlp_fwd_kernel(
    h_ptr,  # [M, H]
    bias_ptr,  # [H], unused unless HAS_BIAS
    out_ptr,  # [M, H], may be h
    M,
    H,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    num_tiles = tl.cdiv(H, BLOCK_H)
    first = (tl.program_id(0) // num_tiles).to(tl.int64) * BLOCK_M
    c = (tl.program_id(0) % num_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    m = first + tl.arange(0, BLOCK_M)
    tile = (m < M)[:, None] & (c < H)[None, :]
    at = m[:, None] * H + c[None, :]
    x = tl.load(h_ptr + at, mask=tile, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + c, mask=c < H, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, (x * _gelu_cdf(x)).to(out_ptr.dtype.element_ty), mask=tile)


@triton.jit
def _gelu_mlp_bwd_kernel(
    h_ptr,  # [M, H]
    bias_ptr,  # [H], unused unless HAS_BIAS
    grad_ptr,  # [M, H], becomes the gradient of h
    out_ptr,  # [M, H]
    parts_ptr,  # [slices, H] float32, unused unless HAS_BIAS
    M,
    H,
    rows_per_slice,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # One program owns a tile of columns of a slice of the rows, so every sum has one fixed order.
    num_tiles = tl.cdiv(H, BLOCK_H)
    part = (tl.program_id(0) // num_tiles).to(tl.int64)
    c = (tl.program_id(0) % num_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = c < H
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    first = part * rows_per_slice
    last = tl.minimum(M, first + rows_per_slice)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        tile = (m < last)[:, None] & inside[None, :]
        at = m[:, None] * H + c[None, :]
        x = tl.load(h_ptr + at, mask=tile, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=tile, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias[None, :]
        cdf = _gelu_cdf(x)
        grad *= cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        tl.store(out_ptr + at, (x * cdf).to(out_ptr.dtype.element_ty), mask=tile)
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=tile)
        sums += grad
    if HAS_BIAS:
        tl.store(parts_ptr + part * H + c, tl.sum(sums, axis=0), mask=inside)


def gelu_mlp_fwd(h: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill out [M, H] with gelu(h + bias); out may be h."""
    rows, columns = h.shape
    if h.numel() == 0:
        return
    grid = (cdiv(rows, CONFIG.BLOCK_M) * cdiv(columns, CONFIG.BLOCK_H),)
    _gelu_mlp_fwd_kernel[grid](
        h,
        h if bias is None else bias,
        out,
        rows,
        columns,
        HAS_BIAS=bias is not None,
        BLOCK_M=CONFIG.BLOCK_M,
        BLOCK_H=CONFIG.BLOCK_H,
        num_warps=CONFIG.num_warps,
    )


def gelu_mlp_bwd(h: Tensor, bias: Tensor | None, grad: Tensor, out: Tensor) -> Tensor:
    """grad [M, H], that of gelu(h + bias), becomes that of h; out is filled with gelu(h + bias).

    Returns the sums of the columns of the new grad, [H] float32, empty without a bias.
    """
    rows, columns = h.shape
    if h.numel() == 0:
        return grad.float().sum(0)
    slices = num_slices(rows, columns, CONFIG.BLOCK_M, CONFIG.BLOCK_H, h.device)
    shape = (0,) if bias is None else (slices, columns)
    parts = h.new_empty(shape, dtype=bias.dtype if bias is not None else None)
    grid = (slices * cdiv(columns, CONFIG.BLOCK_H),)
    _gelu_mlp_bwd_kernel[grid](
        h,
        h if bias is None else bias,
        grad,
        out,
        parts,
        rows,
        columns,
        rows_per_slice(rows, slices, CONFIG.BLOCK_M),
        HAS_BIAS=bias is not None,
        BLOCK_M=CONFIG.BLOCK_M,
        BLOCK_H=CONFIG.BLOCK_H,
        num_warps=CONFIG.num_warps,
    )
    return parts if bias is None else total(parts)


def aot_cases() -> list[AotCase]:
    """bf16 between two products, float32 bias."""
    tiles = {"HAS_BIAS": True, "BLOCK_M": CONFIG.BLOCK_M, "BLOCK_H": CONFIG.BLOCK_H}
    sizes = {"M": "i32", "H": "i32"}
    pointers = {"h_ptr": "*bf16", "bias_ptr": "*fp32", "out_ptr": "*bf16"}
    return [
        AotCase(_gelu_mlp_fwd_kernel, pointers | sizes, tiles, CONFIG.num_warps),
        AotCase(
            _gelu_mlp_bwd_kernel,
            pointers
            | {"grad_ptr": "*bf16", "parts_ptr": "*fp32"}
            | sizes
            | {"rows_per_slice": "i32"},
            tiles,
            CONFIG.num_warps,
        ),
    ]
