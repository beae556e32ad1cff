"""Sums of the columns of a matrix in Triton: a bias's gradient."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, cdiv, device_properties


@dataclass(frozen=True)
class Config:
    """Rows that a program reads at once, and its columns."""

    BLOCK_M: int = 16
    BLOCK_N: int = 128
    num_warps: int = 4


CONFIG = Config()
# Programs per processor that fill a GPU.
_PROGRAMS = 4


@triton.jit
def _column_sums_kernel(
    x_ptr,  # [M, N]
    parts_ptr,  # [slices, N] float32
    M,
    N,
    rows_per_slice,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_tiles = tl.cdiv(N, BLOCK_N)
    part = (tl.program_id(0) // num_tiles).to(tl.int64)
    n = (tl.program_id(0) % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    first = part * rows_per_slice
    last = tl.minimum(M, first + rows_per_slice)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        tile = (m < last)[:, None] & inside[None, :]
        x = tl.load(x_ptr + m[:, None] * N + n[None, :], mask=tile, other=0.0)
        sums += x.to(tl.float32)
    tl.store(parts_ptr + part * N + n, tl.sum(sums, axis=0), mask=inside)


def num_slices(num_rows: int, num_columns: int, block_m: int, block_n: int, device) -> int:
    """Slices of the rows that fill the device, of a whole number of blocks each."""
    tiles = cdiv(num_columns, block_n)
    wanted = max(1, _PROGRAMS * device_properties(device).num_processors // tiles)
    return max(1, min(wanted, cdiv(num_rows, block_m)))


def rows_per_slice(num_rows: int, slices: int, block_m: int) -> int:
    return cdiv(cdiv(num_rows, slices), block_m) * block_m


def total(parts: Tensor) -> Tensor:  # [slices, N] -> [N]
    """The sum of the parts: few, so that torch's launch costs less than one of ours."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def column_sums(x: Tensor) -> Tensor:  # [M, N] -> [N] float32
    rows, columns = x.shape
    if x.numel() == 0:
        return x.new_zeros((columns,), dtype=torch.float32)
    slices = num_slices(rows, columns, CONFIG.BLOCK_M, CONFIG.BLOCK_N, x.device)
    parts = x.new_empty((slices, columns), dtype=torch.float32)
    _column_sums_kernel[(slices * cdiv(columns, CONFIG.BLOCK_N),)](
        x,
        parts,
        rows,
        columns,
        rows_per_slice(rows, slices, CONFIG.BLOCK_M),
        BLOCK_M=CONFIG.BLOCK_M,
        BLOCK_N=CONFIG.BLOCK_N,
        num_warps=CONFIG.num_warps,
    )
    return total(parts)


def aot_cases() -> list[AotCase]:
    """A gradient in bf16 and in float32."""
    return [
        AotCase(
            _column_sums_kernel,
            {"x_ptr": x_ptr, "parts_ptr": "*fp32"}
            | dict.fromkeys(("M", "N", "rows_per_slice"), "i32"),
            {"BLOCK_M": CONFIG.BLOCK_M, "BLOCK_N": CONFIG.BLOCK_N},
            CONFIG.num_warps,
            variant=variant,
        )
        for variant, x_ptr in (("bf16", "*bf16"), ("fp32", "*fp32"))
    ]
