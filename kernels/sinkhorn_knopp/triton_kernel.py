"""The passes of sinkhorn_knopp in Triton. B samples, K prototypes.

A row of 65,536 prototypes does not stay in one processor's registers together with as many column
sums, so an iteration reads the logits twice: once for the rows' sums, once for the columns'.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, cdiv, device_properties, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Column passes take tiles of BLOCK_B samples times BLOCK_K prototypes, row passes a sample in
    pieces of ROW_BLOCK prototypes."""

    BLOCK_B: int = 16
    BLOCK_K: int = 256
    ROW_BLOCK: int = 4096
    num_warps: int = 4
    row_num_warps: int = 8
    # Programs of a column pass per processor.
    waves: int = 4


CONFIG = Config()
# Below the logit of any sample: no sample has been seen.
_LOWEST = -torch.finfo(torch.float32).max


@triton.jit
def _count_rows(num_rows_ptr, B, HAS_NUM_ROWS: tl.constexpr):
    rows = B
    if HAS_NUM_ROWS:
        rows = tl.minimum(tl.load(num_rows_ptr), B).to(tl.int32)
    return rows


@triton.jit
def _sinkhorn_columns_kernel(
    logits_ptr,  # [B, K]
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    parts_ptr,  # [2, slices, K] float32
    B,
    K,
    slices,
    rows_per_slice,
    factor,
    LOWEST: tl.constexpr,
    HAS_NUM_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_blocks = tl.cdiv(K, BLOCK_K)
    part = (tl.program_id(0) // num_blocks).to(tl.int64)
    k = (tl.program_id(0) % num_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = _count_rows(num_rows_ptr, B, HAS_NUM_ROWS)
    end = tl.minimum(rows, (part + 1).to(tl.int32) * rows_per_slice)
    top = tl.full((BLOCK_B, BLOCK_K), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for first in range(part.to(tl.int32) * rows_per_slice, end, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        inside = (b < end)[:, None] & (k < K)[None, :]
        pointers = logits_ptr + b.to(tl.int64)[:, None] * K + k[None, :]
        x = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
        # One exponential: either the sum so far or the new term is the one to shrink.
        above = x > top
        shrink = tl.exp2(-tl.abs(x - top) * factor)
        total = tl.where(above, total * shrink + 1.0, total + shrink)
        top = tl.where(above, x, top)
    highest = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp2((top - highest[None, :]) * factor), axis=0)
    tl.store(parts_ptr + part * K + k, highest, mask=k < K)
    tl.store(parts_ptr + (slices + part) * K + k, total, mask=k < K)


@triton.jit
def _sinkhorn_divide_kernel(
    anchor_ptr,  # [K] float32
    offset_ptr,  # [K] float32
    sums_ptr,  # [K] float32
    K,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    sums = tl.load(sums_ptr + k, mask=inside, other=1.0)
    anchor = tl.load(anchor_ptr + k, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + k, mask=inside, other=0.0)
    # A prototype without mass stays as it is.
    has_mass = sums > 0.0
    offset -= tl.where(has_mass, tl.log2(tl.where(has_mass, sums, 1.0)), 0.0)
    tl.store(offset_ptr + k, offset, mask=inside)
    tl.store(anchor_ptr + k, tl.where(anchor == LOWEST, 0.0, anchor), mask=inside)


@triton.jit
def _row_scores(row_ptr, anchor_ptr, offset_ptr, k, K, factor):
    inside = k < K
    x = tl.load(row_ptr + k, mask=inside, other=float("-inf")).to(tl.float32)
    anchor = tl.load(anchor_ptr + k, mask=inside, other=0.0)
    return (x - anchor) * factor + tl.load(offset_ptr + k, mask=inside, other=0.0)


@triton.jit
def _sinkhorn_rows_kernel(
    logits_ptr,  # [B, K]
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    anchor_ptr,  # [K] float32
    offset_ptr,  # [K] float32
    log2_mass_ptr,  # [B] float32, a guess on entry; log_v on exit if IS_LAST
    shift_ptr,  # [B] float32, unused if IS_LAST
    scale_ptr,  # [B] float32, unused if IS_LAST
    assignment_ptr,  # [B, K] float32, unused unless HAS_ASSIGNMENT
    B,
    K,
    factor,
    IS_LAST: tl.constexpr,
    HAS_ASSIGNMENT: tl.constexpr,
    HAS_NUM_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    in_use = b < _count_rows(num_rows_ptr, B, HAS_NUM_ROWS)
    # The loops over a row that is not in use have no steps: it may hold anything.
    size = tl.where(in_use, K, 0)
    row_ptr = logits_ptr + b * K
    columns = tl.arange(0, BLOCK)
    shift = tl.load(log2_mass_ptr + b)
    terms = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        scores = _row_scores(row_ptr, anchor_ptr, offset_ptr, first + columns, K, factor)
        terms += tl.exp2(scores - shift)
    total = tl.sum(terms, axis=0)
    # From the second iteration on the guess is within a factor of max(B, K) of the truth.
    if (total < 1e-15) | (total > 1e15):
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for first in range(0, size, BLOCK):
            scores = _row_scores(row_ptr, anchor_ptr, offset_ptr, first + columns, K, factor)
            top = tl.maximum(top, scores)
        shift = tl.max(top, axis=0)
        terms = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, size, BLOCK):
            scores = _row_scores(row_ptr, anchor_ptr, offset_ptr, first + columns, K, factor)
            terms += tl.exp2(scores - shift)
        total = tl.sum(terms, axis=0)
    scale = 1.0 / tl.where(in_use, total, 1.0)
    log2_mass = tl.where(in_use, shift - tl.log2(scale), 0.0)
    if IS_LAST:
        tl.store(log2_mass_ptr + b, log2_mass * -0.6931471805599453)
        if HAS_ASSIGNMENT:
            out_ptr = assignment_ptr + b * K
            for first in range(0, size, BLOCK):
                k = first + columns
                scores = _row_scores(row_ptr, anchor_ptr, offset_ptr, k, K, factor)
                tl.store(out_ptr + k, tl.exp2(scores - shift) * scale, mask=k < K)
            for first in range(size, K, BLOCK):
                k = first + columns
                tl.store(out_ptr + k, tl.zeros((BLOCK,), tl.float32), mask=k < K)
    else:
        tl.store(log2_mass_ptr + b, log2_mass)
        # Two numbers: one, log2_mass, would lose the probabilities' last digits where it is large.
        tl.store(shift_ptr + b, shift)
        tl.store(scale_ptr + b, scale)


@triton.jit
def _sinkhorn_column_sums_kernel(
    logits_ptr,  # [B, K]
    num_rows_ptr,  # [] int64, unused unless HAS_NUM_ROWS
    anchor_ptr,  # [K] float32
    offset_ptr,  # [K] float32
    shift_ptr,  # [B] float32
    scale_ptr,  # [B] float32
    parts_ptr,  # [slices, K] float32
    B,
    K,
    rows_per_slice,
    factor,
    HAS_NUM_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_blocks = tl.cdiv(K, BLOCK_K)
    part = (tl.program_id(0) // num_blocks).to(tl.int64)
    k = (tl.program_id(0) % num_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = _count_rows(num_rows_ptr, B, HAS_NUM_ROWS)
    end = tl.minimum(rows, (part + 1).to(tl.int32) * rows_per_slice)
    anchor = tl.load(anchor_ptr + k, mask=k < K, other=0.0)
    offset = tl.load(offset_ptr + k, mask=k < K, other=0.0)
    total = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for first in range(part.to(tl.int32) * rows_per_slice, end, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        inside = (b < end)[:, None] & (k < K)[None, :]
        pointers = logits_ptr + b.to(tl.int64)[:, None] * K + k[None, :]
        x = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
        shift = tl.load(shift_ptr + b, mask=b < end, other=0.0)
        scale = tl.load(scale_ptr + b, mask=b < end, other=0.0)
        scores = (x - anchor[None, :]) * factor + offset[None, :]
        total += tl.exp2(scores - shift[:, None]) * scale[:, None]
    tl.store(parts_ptr + part * K + k, tl.sum(total, axis=0), mask=k < K)


def _slices(logits: Tensor) -> tuple[int, int, int]:
    """Slices of the rows of a column pass, rows in each, programs in all."""
    batch, num_prototypes = logits.shape
    blocks = cdiv(num_prototypes, CONFIG.BLOCK_K)
    wanted = cdiv(CONFIG.waves * device_properties(logits.device).num_processors, blocks)
    tiles = max(1, cdiv(batch, CONFIG.BLOCK_B))
    rows = cdiv(tiles, min(tiles, wanted)) * CONFIG.BLOCK_B
    slices = max(1, cdiv(batch, rows))
    return slices, rows, slices * blocks


def columns(
    logits: Tensor, num_rows: Tensor | None, factor: float, anchor: Tensor, sums: Tensor
) -> None:
    """Fill anchor [K], the largest logits, and sums [K] of 2^((logit - anchor) * factor)."""
    batch, num_prototypes = logits.shape
    slices, rows_per_slice, programs = _slices(logits)
    parts = anchor.new_empty((2, slices, num_prototypes))
    _sinkhorn_columns_kernel[(programs,)](
        logits,
        parts if num_rows is None else num_rows,
        parts,
        batch,
        num_prototypes,
        slices,
        rows_per_slice,
        factor,
        LOWEST=_LOWEST,
        HAS_NUM_ROWS=num_rows is not None,
        BLOCK_B=CONFIG.BLOCK_B,
        BLOCK_K=CONFIG.BLOCK_K,
        num_warps=CONFIG.num_warps,
    )
    top, total = parts
    torch.amax(top, dim=0, out=anchor)
    torch.sum(total * ((top - anchor) * factor).exp2(), dim=0, out=sums)


def move(old: Tensor, new: Tensor, factor: float, sums: Tensor) -> None:
    """Move sums from one anchor to a larger one."""
    sums.mul_(((old - new) * factor).exp2())


def _divide(anchor: Tensor, offset: Tensor, sums: Tensor) -> None:
    num_prototypes = sums.shape[0]
    _sinkhorn_divide_kernel[(cdiv(num_prototypes, 1024),)](
        anchor, offset, sums, num_prototypes, LOWEST=_LOWEST, BLOCK=1024, num_warps=4
    )


def _row_pass(
    logits: Tensor,
    num_rows: Tensor | None,
    factor: float,
    anchor: Tensor,
    offset: Tensor,
    log2_mass: Tensor,
    stats: Tensor | None,  # [2, B], or None in the last pass
    assignment: Tensor | None,
) -> None:
    batch, num_prototypes = logits.shape
    if batch == 0:
        return
    shift, scale = (anchor, anchor) if stats is None else stats
    _sinkhorn_rows_kernel[(batch,)](
        logits,
        anchor if num_rows is None else num_rows,
        anchor,
        offset,
        log2_mass,
        shift,
        scale,
        anchor if assignment is None else assignment,
        batch,
        num_prototypes,
        factor,
        IS_LAST=stats is None,
        HAS_ASSIGNMENT=assignment is not None,
        HAS_NUM_ROWS=num_rows is not None,
        BLOCK=min(CONFIG.ROW_BLOCK, next_power_of_2(num_prototypes)),
        num_warps=CONFIG.row_num_warps,
    )


def iterate(
    logits: Tensor,
    num_rows: Tensor | None,
    factor: float,
    anchor: Tensor,
    offset: Tensor,
    log2_mass: Tensor,
    sums: Tensor,
) -> None:
    """Divide prototypes by sums, then samples by theirs; sums [K] become the new column sums."""
    batch, num_prototypes = logits.shape
    _divide(anchor, offset, sums)
    stats = anchor.new_empty((2, batch))
    _row_pass(logits, num_rows, factor, anchor, offset, log2_mass, stats, None)
    slices, rows_per_slice, programs = _slices(logits)
    parts = anchor.new_empty((slices, num_prototypes))
    shift, scale = stats
    _sinkhorn_column_sums_kernel[(programs,)](
        logits,
        anchor if num_rows is None else num_rows,
        anchor,
        offset,
        shift,
        scale,
        parts,
        batch,
        num_prototypes,
        rows_per_slice,
        factor,
        HAS_NUM_ROWS=num_rows is not None,
        BLOCK_B=CONFIG.BLOCK_B,
        BLOCK_K=CONFIG.BLOCK_K,
        num_warps=CONFIG.num_warps,
    )
    torch.sum(parts, dim=0, out=sums)


def assign(
    logits: Tensor,
    num_rows: Tensor | None,
    factor: float,
    anchor: Tensor,
    offset: Tensor,
    sums: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    assignment: Tensor | None,
) -> None:
    """Divide both a last time; log_v comes in as log2_mass."""
    _divide(anchor, offset, sums)
    _row_pass(logits, num_rows, factor, anchor, offset, log_v, None, assignment)
    log_u.copy_((offset.double() - anchor.double() * factor) * math.log(2))


def aot_cases() -> list[AotCase]:
    """Production shapes: 4096 samples over 65,536 prototypes, bf16, a row count on the device."""
    tile = {"BLOCK_B": CONFIG.BLOCK_B, "BLOCK_K": CONFIG.BLOCK_K, "HAS_NUM_ROWS": True}
    inputs = {"logits_ptr": "*bf16", "num_rows_ptr": "*i64"}
    vectors = {"anchor_ptr": "*fp32", "offset_ptr": "*fp32"}
    row_stats = {"shift_ptr": "*fp32", "scale_ptr": "*fp32"}
    sizes = {"B": "i32", "K": "i32", "rows_per_slice": "i32", "factor": "fp32"}
    rows = inputs | vectors | row_stats
    rows |= {"log2_mass_ptr": "*fp32", "assignment_ptr": "*fp32"}
    rows |= {"B": "i32", "K": "i32", "factor": "fp32"}
    return [
        AotCase(
            _sinkhorn_columns_kernel,
            inputs | {"parts_ptr": "*fp32", "slices": "i32"} | sizes,
            {"LOWEST": _LOWEST} | tile,
            CONFIG.num_warps,
        ),
        AotCase(
            _sinkhorn_divide_kernel,
            vectors | {"sums_ptr": "*fp32", "K": "i32"},
            {"LOWEST": _LOWEST, "BLOCK": 1024},
            4,
        ),
        AotCase(
            _sinkhorn_column_sums_kernel,
            inputs | vectors | row_stats | {"parts_ptr": "*fp32"} | sizes,
            tile,
            CONFIG.num_warps,
        ),
        *(
            AotCase(
                _sinkhorn_rows_kernel,
                rows,
                {"IS_LAST": is_last, "HAS_ASSIGNMENT": is_last, "HAS_NUM_ROWS": True}
                | {"BLOCK": CONFIG.ROW_BLOCK},
                CONFIG.row_num_warps,
                variant="last" if is_last else "",
            )
            for is_last in (False, True)
        ),
    ]
