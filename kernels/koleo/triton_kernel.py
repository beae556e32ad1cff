"""koleo in Triton; same functions as cpp_kernel.py. N rows among C columns, D dimensions."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common import libraries
from fastssl.kernels.common.triton_utils import AotCase, cdiv, device_properties, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_R rows times BLOCK_C columns, in steps of BLOCK_D dimensions."""

    BLOCK_R: int
    BLOCK_C: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# By bytes per element.
CONFIGS = {2: Config(128, 128, 32, 8, 3), 4: Config(64, 64, 32, 8, 3)}
# Programs per processor of the search, which a few rows alone would not give.
WAVES = 2


@triton.jit
def _koleo_nearest_kernel(
    x_ptr,  # [C, D]
    norm_ptr,  # [C] float32, unused unless DIVIDES
    top_ptr,  # [slices, N] float32
    index_ptr,  # [slices, N] int32
    N,
    C,
    D,
    first,
    columns_per_slice,
    DIVIDES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_R)
    part = tl.program_id(0) // row_blocks
    r = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    self = first + r
    row_ptr = x_ptr + self.to(tl.int64)[:, None] * D
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    # A row without a single number gets a neighbour, too.
    index = tl.where(self == 0, 1, 0)
    begin = part * columns_per_slice
    for start in range(begin, tl.minimum(C, begin + columns_per_slice), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        column_ptr = x_ptr + c.to(tl.int64)[None, :] * D
        products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for k in range(0, D, BLOCK_D):
            d = k + tl.arange(0, BLOCK_D)
            rows_inside = (r < N)[:, None] & (d < D)[None, :]
            columns_inside = (d < D)[:, None] & (c < C)[None, :]
            rows = tl.load(row_ptr + d[None, :], mask=rows_inside, other=0.0)
            columns = tl.load(column_ptr + d[:, None], mask=columns_inside, other=0.0)
            products = tl.dot(rows, columns, products, input_precision="tf32x3")
        if DIVIDES:
            # The row's own length does not change which is the largest.
            products /= tl.load(norm_ptr + c, mask=c < C, other=1.0)[None, :]
        counts = (c < C)[None, :] & (c[None, :] != self[:, None])
        products = tl.where(counts, products, float("-inf"))
        highest, place = tl.max(products, axis=1, return_indices=True)
        nearer = highest > top
        top = tl.where(nearer, highest, top)
        index = tl.where(nearer, start + place, index)
    to = part.to(tl.int64) * N + r
    tl.store(top_ptr + to, top, mask=r < N)
    tl.store(index_ptr + to, index, mask=r < N)


@triton.jit
def _koleo_distances_kernel(
    unit_ptr,  # [C, D] float32
    nearest_ptr,  # [N] int64
    distances_ptr,  # [N] float32
    D,
    first,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    own = tl.load(unit_ptr + (first + n) * D + d, mask=d < D, other=0.0)
    other = tl.load(unit_ptr + tl.load(nearest_ptr + n) * D + d, mask=d < D, other=0.0)
    distance = tl.sqrt_rn(tl.sum((own - other) * (own - other), axis=0))
    tl.store(distances_ptr + n, distance)


@triton.jit
def _koleo_gradient_kernel(
    unit_ptr,  # [C, D] float32
    norm_ptr,  # [N] float32
    nearest_ptr,  # [C] int64
    weights_ptr,  # [C] float32
    order_ptr,  # [C] int64
    offsets_ptr,  # [N + 1] int64
    dx_ptr,  # [N, D]
    D,
    first,
    min_length,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    self = first + n
    d = tl.arange(0, BLOCK_D)
    own = tl.load(unit_ptr + self * D + d, mask=d < D, other=0.0)
    other = tl.load(unit_ptr + tl.load(nearest_ptr + self) * D + d, mask=d < D, other=0.0)
    du = tl.load(weights_ptr + self) * (own - other)
    # In the order of rows, whatever the number of programs.
    for i in range(tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)):
        query = tl.load(order_ptr + i)
        other = tl.load(unit_ptr + query * D + d, mask=d < D, other=0.0)
        du += tl.load(weights_ptr + query) * (own - other)
    norm = tl.load(norm_ptr + n)
    along = tl.where(norm <= min_length, 0.0, tl.sum(du * own, axis=0))
    dx = (du - along * own) / norm
    tl.store(dx_ptr + n * D + d, dx.to(dx_ptr.dtype.element_ty), mask=d < D)


def _row_options(dim: int) -> dict[str, int]:
    block = next_power_of_2(dim)
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 256))}


def normalize(x: Tensor, min_length: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp_(min=min_length)
    return x / norm[:, None], norm


def nearest(x: Tensor, unit: Tensor, norm: Tensor, first: int, count: int) -> Tensor:
    # Features of 16 bits multiply as they are, faster than float32 unit vectors; but Triton's
    # interpreter would multiply the bit patterns of bfloat16.
    divides = x.element_size() == 2 and not (
        x.dtype == torch.bfloat16 and libraries.triton_interprets()
    )
    config = CONFIGS[2 if divides else 4]
    total, dim = x.shape
    row_blocks, column_blocks = cdiv(count, config.BLOCK_R), -(-total // config.BLOCK_C)
    programs = WAVES * device_properties(x.device).num_processors
    slices = min(column_blocks, cdiv(programs, row_blocks))
    columns_per_slice = cdiv(column_blocks, slices) * config.BLOCK_C
    slices = cdiv(total, columns_per_slice)
    top = norm.new_empty((slices, count))
    index = torch.empty_like(top, dtype=torch.int32)
    _koleo_nearest_kernel[(row_blocks * slices,)](
        *(x if divides else unit, norm, top, index, count, total, dim, first, columns_per_slice),
        DIVIDES=divides,
        BLOCK_R=config.BLOCK_R,
        BLOCK_C=config.BLOCK_C,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    # Slices are in the order of columns, and argmax takes the first of equal ones.
    return index.gather(0, top.argmax(dim=0, keepdim=True))[0].long()


def distances(unit: Tensor, first: int, nearest: Tensor) -> Tensor:
    out, dim = unit.new_empty(len(nearest)), unit.shape[1]
    _koleo_distances_kernel[(len(nearest),)](unit, nearest, out, dim, first, **_row_options(dim))
    return out


def gradient(
    unit: Tensor,
    first: int,
    norm: Tensor,
    min_length: float,
    nearest: Tensor,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    dim = unit.shape[1]
    dx = unit.new_empty((len(norm), dim), dtype=dtype)
    _koleo_gradient_kernel[(len(norm),)](
        *(unit, norm, nearest, weights, order, offsets, dx, dim, first, min_length),
        **_row_options(dim),
    )
    return dx


def aot_cases() -> list[AotCase]:
    """bf16 and float32 features of 384 dimensions."""
    cases = []
    sizes = dict.fromkeys(("N", "C", "D", "first", "columns_per_slice"), "i32")
    for type_name, config in (("bf16", CONFIGS[2]), ("fp32", CONFIGS[4])):
        tiles = {"BLOCK_R": config.BLOCK_R, "BLOCK_C": config.BLOCK_C, "BLOCK_D": config.BLOCK_D}
        pointers = {"x_ptr": f"*{type_name}", "norm_ptr": "*fp32", "top_ptr": "*fp32"}
        cases.append(
            AotCase(
                _koleo_nearest_kernel,
                pointers | {"index_ptr": "*i32"} | sizes,
                {"DIVIDES": type_name == "bf16", **tiles},
                config.num_warps,
                config.num_stages,
                variant=type_name,
            )
        )
    options = _row_options(384)
    num_warps = options.pop("num_warps")
    rows = {"unit_ptr": "*fp32", "nearest_ptr": "*i64", "D": "i32", "first": "i32"}
    cases.append(
        AotCase(_koleo_distances_kernel, rows | {"distances_ptr": "*fp32"}, options, num_warps)
    )
    rows |= dict.fromkeys(("norm_ptr", "weights_ptr"), "*fp32") | {"dx_ptr": "*bf16"}
    rows |= dict.fromkeys(("order_ptr", "offsets_ptr"), "*i64") | {"min_length": "fp32"}
    cases.append(AotCase(_koleo_gradient_kernel, rows, options, num_warps))
    return cases
