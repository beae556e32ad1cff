"""Triton kernels of contrastive losses. R rows, C columns of scores, D dimensions.

A score is factor * (row . column), times the inverse lengths of both where given, in units of
log 2. Products run in the dtype of the rows; PRECISION says how float32 ones do.
"""

import triton
import triton.language as tl

from fastssl.kernels.common.contrastive import LOWEST

_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _load_tile(ptr, index, size, D, dtype: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = ptr + index.to(tl.int64)[:, None] * D + d[None, :]
    inside = (index < size)[:, None] & (d < D)[None, :]
    return tl.load(pointers, mask=inside, other=0.0).to(dtype)


@triton.jit
def _load_scale(ptr, index, size, HAS_SCALE: tl.constexpr):
    scale = tl.full(index.shape, 1.0, tl.float32)
    if HAS_SCALE:
        scale = tl.load(ptr + index, mask=index < size, other=0.0)
    return scale


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, UPCASTS: tl.constexpr):
    if UPCASTS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _weigh(
    terms,
    columns,
    column_scale,
    IS_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCASTS: tl.constexpr,
):
    """terms [R, C] times the unit columns, [R, D]."""
    terms *= column_scale[None, :]
    if IS_HALF:
        # The inverse of a length below 2^-16; the vector itself is next to nothing then.
        terms = tl.clamp(terms, -65504.0, 65504.0)
    return _product(terms.to(columns.dtype), columns, PRECISION, UPCASTS)


@triton.jit
def _contrastive_stream_kernel(
    rows_ptr,  # [R, D]
    row_scale_ptr,  # [R] float32, unused unless HAS_ROW_SCALE
    columns_ptr,  # [C, D]
    column_scale_ptr,  # [C] float32, unused unless HAS_COLUMN_SCALE
    factor_ptr,  # [] float32
    top_ptr,  # [slices, R] float32
    total_ptr,  # [slices, R] float32
    weighted_ptr,  # [slices, R, D] float32, unused unless HAS_WEIGHTED
    R,
    C,
    D,
    first,
    columns_per_slice,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    SKIPS_OWN: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    IS_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCASTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_blocks = tl.cdiv(R, BLOCK_R)
    part = tl.program_id(0) // row_blocks
    r = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = _load_tile(rows_ptr, r, R, D, rows_ptr.dtype.element_ty, BLOCK_D)
    row_scale = _load_scale(row_scale_ptr, r, R, HAS_ROW_SCALE) * tl.load(factor_ptr)
    top = tl.full((BLOCK_R,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    weighted = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    begin = part * columns_per_slice
    for start in range(begin, tl.minimum(C, begin + columns_per_slice), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        columns = _load_tile(columns_ptr, c, C, D, rows.dtype, BLOCK_D)
        column_scale = _load_scale(column_scale_ptr, c, C, HAS_COLUMN_SCALE)
        scores = _product(rows, tl.trans(columns), PRECISION, UPCASTS)
        scores *= row_scale[:, None] * column_scale[None, :]
        counts = (c < C)[None, :]
        if SKIPS_OWN:
            counts = counts & (c[None, :] != first + r[:, None])
        scores = tl.where(counts, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        terms = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(terms, axis=1)
        if HAS_WEIGHTED:
            weighted = weighted * shrink[:, None] + _weigh(
                terms, columns, column_scale, IS_HALF, PRECISION, UPCASTS
            )
        top = highest
    to = part.to(tl.int64) * R + r
    tl.store(top_ptr + to, top, mask=r < R)
    tl.store(total_ptr + to, total, mask=r < R)
    if HAS_WEIGHTED:
        d = tl.arange(0, BLOCK_D)
        inside = (r < R)[:, None] & (d < D)[None, :]
        tl.store(weighted_ptr + to[:, None] * D + d[None, :], weighted, mask=inside)


@triton.jit
def _contrastive_per_row_kernel(
    rows_ptr,  # [R, D]
    row_scale_ptr,  # [R] float32, unused unless HAS_ROW_SCALE
    negatives_ptr,  # [R, M, D]
    factor_ptr,  # [] float32
    top_ptr,  # [R] float32
    total_ptr,  # [R] float32
    weighted_ptr,  # [R, D] float32, unused unless HAS_WEIGHTED
    M,
    D,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    scale = tl.load(factor_ptr)
    if HAS_ROW_SCALE:
        scale *= tl.load(row_scale_ptr + r)
    row = tl.load(rows_ptr + r * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    # One top and one total per place in a block of negatives; they meet at the end.
    top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        block = _load_tile(negatives_ptr + r * M * D, m, M, D, tl.float32, BLOCK_D)
        scores = tl.where(m < M, tl.sum(block * row[None, :], axis=1), float("-inf"))
        highest = tl.maximum(top, scores)
        terms = tl.exp2(scores - highest)
        shrink = tl.exp2(top - highest)
        total = total * shrink + terms
        if HAS_WEIGHTED:
            weighted = weighted * shrink[:, None] + block * terms[:, None]
        top = highest
    highest = tl.max(top, axis=0)
    shrink = tl.exp2(top - highest)
    tl.store(top_ptr + r, highest)
    tl.store(total_ptr + r, tl.sum(total * shrink, axis=0))
    if HAS_WEIGHTED:
        weighted = tl.sum(weighted * shrink[:, None], axis=0)
        tl.store(weighted_ptr + r * D + d, weighted, mask=d < D)


@triton.jit
def _contrastive_gradient_kernel(
    rows_ptr,  # [R, D]
    row_scale_ptr,  # [R] float32, unused unless HAS_ROW_SCALE
    columns_ptr,  # [C, D]
    column_scale_ptr,  # [C] float32, unused unless HAS_COLUMN_SCALE
    factor_ptr,  # [] float32
    row_total_ptr,  # [R] float32, unused unless IS_PAIR
    column_total_ptr,  # [C] float32
    weights_ptr,  # [C] float32, unused unless IS_PAIR
    gradient_ptr,  # [R, D] float32
    R,
    C,
    D,
    first,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    IS_PAIR: tl.constexpr,
    IS_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCASTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = _load_tile(rows_ptr, r, R, D, rows_ptr.dtype.element_ty, BLOCK_D)
    row_scale = _load_scale(row_scale_ptr, r, R, HAS_ROW_SCALE) * tl.load(factor_ptr)
    if IS_PAIR:
        row_total = tl.load(row_total_ptr + r, mask=r < R, other=0.0)
        row_weight = tl.load(weights_ptr + first + r, mask=r < R, other=0.0)
    gradient = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        columns = _load_tile(columns_ptr, c, C, D, rows.dtype, BLOCK_D)
        column_scale = _load_scale(column_scale_ptr, c, C, HAS_COLUMN_SCALE)
        scores = _product(rows, tl.trans(columns), PRECISION, UPCASTS)
        scores *= row_scale[:, None] * column_scale[None, :]
        counts = (r < R)[:, None] & (c < C)[None, :]
        column_total = tl.load(column_total_ptr + c, mask=c < C, other=0.0)
        if IS_PAIR:
            counts = counts & (c[None, :] != first + r[:, None])
        scores = tl.where(counts, scores, float("-inf"))
        terms = tl.exp2(scores - column_total[None, :])
        if IS_PAIR:
            weight = tl.load(weights_ptr + c, mask=c < C, other=0.0)
            terms = terms * weight[None, :]
            terms += tl.exp2(scores - row_total[:, None]) * row_weight[:, None]
        gradient += _weigh(terms, columns, column_scale, IS_HALF, PRECISION, UPCASTS)
    d = tl.arange(0, BLOCK_D)
    inside = (r < R)[:, None] & (d < D)[None, :]
    to = gradient_ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(to, gradient, mask=inside)
