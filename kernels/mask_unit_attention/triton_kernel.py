"""mask_unit_attention in Triton. H heads of D channels, units of U tokens and U / S queries.

A tile is P whole units, so that small ones fill it: P * U keys and P * U / S queries, counted from
the tile's first. A head's channels come in two parts, see triton_blocks.py. Scores are in units of
log 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.libraries import triton_interprets
from fastssl.kernels.common.triton_utils import AotCase, cdiv
from fastssl.kernels.mask_unit_attention.triton_blocks import (
    inner,
    load,
    load_queries,
    masked,
    mix,
    store,
    store_query_gradient,
)
from fastssl.kernels.mask_unit_attention.triton_tiles import Plan, backward_plans, forward_plan

_LOWEST = tl.constexpr(-torch.finfo(torch.float32).max)


@triton.jit
def _mask_unit_attention_fwd_kernel(
    qkv_ptr,  # [units * U, 3, H, D]
    out_ptr,  # [units * U / S, H, D]
    num_units,
    H,
    scale,
    U: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCASTS: tl.constexpr,
):
    block = tl.program_id(0) // tl.cdiv(P * U // S, BLOCK_Q)
    tile, head = (block // H).to(tl.int64), block % H
    units = tl.minimum(P, num_units - block // H * P)
    stride = 3 * H * D
    q_ptr = qkv_ptr + tile * (P * U * stride) + head * D
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    i = tl.program_id(0) % tl.cdiv(P * U // S, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_inside = i < units * (U // S)
    q1, q2, _, _ = load_queries(q_ptr, i, stride, i_inside, D, D1, D2, U, S)
    top = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out1 = tl.zeros((BLOCK_Q, D1), tl.float32)
    out2 = out1
    if D2 > 0:
        out2 = tl.zeros((BLOCK_Q, D2), tl.float32)
    for start in range(0, P * U, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        c_inside = c < units * U
        k1, k2 = load(k_ptr, c * stride, c_inside, D, D1, D2)
        v1, v2 = load(v_ptr, c * stride, c_inside, D, D1, D2)
        scores = inner(q1, q2, k1, k2, D2, PRECISION, UPCASTS)
        scores = masked(scores, scale, i[:, None], c[None, :], U, S)
        highest = tl.maximum(top, tl.max(scores, axis=1))
        terms = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(terms, axis=1)
        more1, more2 = mix(terms, v1, v2, D2, PRECISION, UPCASTS)
        out1 = out1 * shrink[:, None] + more1
        if D2 > 0:
            out2 = out2 * shrink[:, None] + more2
        top = highest
    # The largest term is 1; only a query past the tile has a smaller sum.
    share = 1 / tl.maximum(total, 1.0)[:, None]
    out_ptr += (tile * (P * U // S) * H + head) * D
    store(out_ptr, i * (H * D), out1 * share, out2 * share, i_inside, D, D1, D2)


@triton.jit
def _mask_unit_attention_bwd_tile_kernel(
    dout_ptr,  # [units * U / S, H, D]
    qkv_ptr,  # [units * U, 3, H, D]
    dqkv_ptr,  # [units * U, 3, H, D]
    num_units,
    H,
    scale,
    U: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCASTS: tl.constexpr,
):
    # One block holds all keys of the tile. Scores lie the other way round in backward, [keys,
    # queries]: the long side is the rows of four products out of five, none of them transposed.
    block = tl.program_id(0)
    tile, head = (block // H).to(tl.int64), block % H
    units = tl.minimum(P, num_units - block // H * P)
    stride = 3 * H * D
    first = tile * (P * U * stride) + head * D
    q_ptr, dq_ptr = qkv_ptr + first, dqkv_ptr + first
    dout_ptr += (tile * (P * U // S) * H + head) * D
    c = tl.arange(0, BLOCK_K)
    c_inside = c < units * U
    k1, k2 = load(q_ptr + H * D, c * stride, c_inside, D, D1, D2)
    v1, v2 = load(q_ptr + 2 * H * D, c * stride, c_inside, D, D1, D2)
    dk1 = tl.zeros((BLOCK_K, D1), tl.float32)
    dv1 = dk1
    dk2, dv2 = dk1, dk1
    if D2 > 0:
        dk2 = tl.zeros((BLOCK_K, D2), tl.float32)
        dv2 = dk2
    for start in range(0, P * U // S, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        i_inside = i < units * (U // S)
        q1, q2, winner1, winner2 = load_queries(q_ptr, i, stride, i_inside, D, D1, D2, U, S)
        dout1, dout2 = load(dout_ptr, i * (H * D), i_inside, D, D1, D2)
        scores = inner(k1, k2, q1, q2, D2, PRECISION, UPCASTS)
        scores = masked(scores, scale, i[None, :], c[:, None], U, S)
        p = tl.exp2(scores - tl.maximum(tl.max(scores, axis=0), _LOWEST)[None, :])
        p *= 1 / tl.maximum(tl.sum(p, axis=0), 1.0)[None, :]
        more1, more2 = mix(p, dout1, dout2, D2, PRECISION, UPCASTS)
        dv1 += more1
        if D2 > 0:
            dv2 += more2
        dp = inner(v1, v2, dout1, dout2, D2, PRECISION, UPCASTS)
        dscores = p * (dp - tl.sum(p * dp, axis=0)[None, :])
        # The order that takes fewer registers.
        if S > 1:
            more1, more2 = mix(dscores, q1, q2, D2, PRECISION, UPCASTS)
            dk1 += more1
            if D2 > 0:
                dk2 += more2
        dq1, dq2 = mix(tl.trans(dscores), k1, k2, D2, PRECISION, UPCASTS)
        dq1, dq2 = dq1 * scale, dq2 * scale
        store_query_gradient(
            dq_ptr, i, stride, i_inside, dq1, dq2, winner1, winner2, D, D1, D2, U, S
        )
        if S == 1:
            more1, more2 = mix(dscores, q1, q2, D2, PRECISION, UPCASTS)
            dk1 += more1
            if D2 > 0:
                dk2 += more2
    store(dq_ptr + H * D, c * stride, dk1 * scale, dk2 * scale, c_inside, D, D1, D2)
    store(dq_ptr + 2 * H * D, c * stride, dv1, dv2, c_inside, D, D1, D2)


@triton.jit
def _mask_unit_attention_bwd_queries_kernel(
    dout_ptr,  # [units * U / S, H, D]
    qkv_ptr,  # [units * U, 3, H, D]
    dqkv_ptr,  # [units * U, 3, H, D]
    lse_ptr,  # [tiles, H, P * U / S] float32
    delta_ptr,  # [tiles, H, P * U / S] float32
    num_units,
    H,
    scale,
    U: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCASTS: tl.constexpr,
):
    block = tl.program_id(0) // tl.cdiv(P * U // S, BLOCK_Q)
    tile, head = (block // H).to(tl.int64), block % H
    units = tl.minimum(P, num_units - block // H * P)
    stride = 3 * H * D
    first = tile * (P * U * stride) + head * D
    q_ptr = qkv_ptr + first
    k_ptr, v_ptr = q_ptr + H * D, q_ptr + 2 * H * D
    i = tl.program_id(0) % tl.cdiv(P * U // S, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_inside = i < units * (U // S)
    q1, q2, winner1, winner2 = load_queries(q_ptr, i, stride, i_inside, D, D1, D2, U, S)
    dout_ptr += (tile * (P * U // S) * H + head) * D
    dout1, dout2 = load(dout_ptr, i * (H * D), i_inside, D, D1, D2)
    top = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, P * U, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        c_inside = c < units * U
        k1, k2 = load(k_ptr, c * stride, c_inside, D, D1, D2)
        v1, v2 = load(v_ptr, c * stride, c_inside, D, D1, D2)
        scores = inner(q1, q2, k1, k2, D2, PRECISION, UPCASTS)
        scores = masked(scores, scale, i[:, None], c[None, :], U, S)
        dp = inner(dout1, dout2, v1, v2, D2, PRECISION, UPCASTS)
        highest = tl.maximum(top, tl.max(scores, axis=1))
        terms = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(terms, axis=1)
        weighted = weighted * shrink + tl.sum(terms * dp, axis=1)
        top = highest
    total = tl.maximum(total, 1.0)
    lse, delta = top + tl.log2(total), weighted / total
    dq1 = tl.zeros((BLOCK_Q, D1), tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros((BLOCK_Q, D2), tl.float32)
    # Where one block holds all keys, the compiler sees that it has these products already.
    for start in range(0, P * U, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        c_inside = c < units * U
        k1, k2 = load(k_ptr, c * stride, c_inside, D, D1, D2)
        v1, v2 = load(v_ptr, c * stride, c_inside, D, D1, D2)
        scores = inner(q1, q2, k1, k2, D2, PRECISION, UPCASTS)
        scores = masked(scores, scale, i[:, None], c[None, :], U, S)
        dp = inner(dout1, dout2, v1, v2, D2, PRECISION, UPCASTS)
        dscores = tl.exp2(scores - lse[:, None]) * (dp - delta[:, None])
        more1, more2 = mix(dscores, k1, k2, D2, PRECISION, UPCASTS)
        dq1 += more1
        if D2 > 0:
            dq2 += more2
    to = block.to(tl.int64) * (P * U // S) + i
    tl.store(lse_ptr + to, lse, mask=i_inside)
    tl.store(delta_ptr + to, delta, mask=i_inside)
    dq1, dq2 = dq1 * scale, dq2 * scale
    store_query_gradient(
        dqkv_ptr + first, i, stride, i_inside, dq1, dq2, winner1, winner2, D, D1, D2, U, S
    )


@triton.jit
def _mask_unit_attention_bwd_keys_kernel(
    dout_ptr,  # [units * U / S, H, D]
    qkv_ptr,  # [units * U, 3, H, D]
    dqkv_ptr,  # [units * U, 3, H, D]
    lse_ptr,  # [tiles, H, P * U / S] float32
    delta_ptr,  # [tiles, H, P * U / S] float32
    num_units,
    H,
    scale,
    U: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCASTS: tl.constexpr,
):
    block = tl.program_id(0) // tl.cdiv(P * U, BLOCK_K)
    tile, head = (block // H).to(tl.int64), block % H
    units = tl.minimum(P, num_units - block // H * P)
    stride = 3 * H * D
    first = tile * (P * U * stride) + head * D
    q_ptr = qkv_ptr + first
    c = tl.program_id(0) % tl.cdiv(P * U, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    c_inside = c < units * U
    k1, k2 = load(q_ptr + H * D, c * stride, c_inside, D, D1, D2)
    v1, v2 = load(q_ptr + 2 * H * D, c * stride, c_inside, D, D1, D2)
    dout_ptr += (tile * (P * U // S) * H + head) * D
    lse_ptr += block.to(tl.int64) * (P * U // S)
    delta_ptr += block.to(tl.int64) * (P * U // S)
    dk1 = tl.zeros((BLOCK_K, D1), tl.float32)
    dv1 = dk1
    dk2, dv2 = dk1, dk1
    if D2 > 0:
        dk2 = tl.zeros((BLOCK_K, D2), tl.float32)
        dv2 = dk2
    for start in range(0, P * U // S, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        i_inside = i < units * (U // S)
        q1, q2, _, _ = load_queries(q_ptr, i, stride, i_inside, D, D1, D2, U, S)
        dout1, dout2 = load(dout_ptr, i * (H * D), i_inside, D, D1, D2)
        lse = tl.load(lse_ptr + i, mask=i_inside, other=0.0)
        delta = tl.load(delta_ptr + i, mask=i_inside, other=0.0)
        scores = inner(k1, k2, q1, q2, D2, PRECISION, UPCASTS)
        scores = masked(scores, scale, i[None, :], c[:, None], U, S)
        p = tl.exp2(scores - lse[None, :])
        more1, more2 = mix(p, dout1, dout2, D2, PRECISION, UPCASTS)
        dv1 += more1
        if D2 > 0:
            dv2 += more2
        dp = inner(v1, v2, dout1, dout2, D2, PRECISION, UPCASTS)
        more1, more2 = mix(p * (dp - delta[None, :]), q1, q2, D2, PRECISION, UPCASTS)
        dk1 += more1
        if D2 > 0:
            dk2 += more2
    dk_ptr = dqkv_ptr + first + H * D
    store(dk_ptr, c * stride, dk1 * scale, dk2 * scale, c_inside, D, D1, D2)
    store(dk_ptr + H * D, c * stride, dv1, dv2, c_inside, D, D1, D2)


def _options(plan: Plan, qkv: Tensor) -> dict[str, object]:
    # Triton's interpreter takes the bits of bfloat16 for integers in products, and cuts where it
    # should round.
    upcasts = qkv.dtype == torch.bfloat16 and triton_interprets()
    return {**plan.sizes, "UPCASTS": upcasts, **plan.launch}


def mask_unit_attention_fwd(
    qkv: Tensor, num_heads: int, unit_size: int, q_stride: int, out: Tensor
) -> None:
    """Fill out [B, N / q_stride, D]; see __init__.py for the formula."""
    if out.numel() == 0:
        return
    head_dim = out.shape[2] // num_heads
    num_units = qkv.shape[0] * qkv.shape[1] // unit_size
    plan = forward_plan(qkv.element_size(), head_dim, unit_size, q_stride)
    programs = cdiv(num_units, plan.units) * num_heads * plan.query_blocks
    _mask_unit_attention_fwd_kernel[(programs,)](
        *(qkv, out, num_units, num_heads, head_dim**-0.5), **_options(plan, qkv)
    )


def mask_unit_attention_bwd(
    dout: Tensor, qkv: Tensor, num_heads: int, unit_size: int, q_stride: int, dqkv: Tensor
) -> None:
    """Fill dqkv, of qkv's shape."""
    if dqkv.numel() == 0:
        return
    head_dim = dout.shape[2] // num_heads
    num_units = qkv.shape[0] * qkv.shape[1] // unit_size
    plan, *others = backward_plans(qkv.element_size(), head_dim, unit_size, q_stride)
    tiles = cdiv(num_units, plan.units) * num_heads
    tensors, settings = (dout, qkv, dqkv), (num_units, num_heads, head_dim**-0.5)
    if not others:
        kernel = _mask_unit_attention_bwd_tile_kernel
        kernel[(tiles,)](*tensors, *settings, **_options(plan, qkv))
        return
    queries = plan.units * unit_size // q_stride
    statistics = torch.empty((2, tiles, queries), dtype=torch.float32, device=qkv.device)
    _mask_unit_attention_bwd_queries_kernel[(tiles * plan.query_blocks,)](
        *tensors, *statistics, *settings, **_options(plan, qkv)
    )
    _mask_unit_attention_bwd_keys_kernel[(tiles * others[0].key_blocks,)](
        *tensors, *statistics, *settings, **_options(others[0], qkv)
    )


# U, S, D of Hiera B, B+, L and H in their first stages; and of short sequences in its later ones
# and in MAEs, of an encoder's tokens that are left and of the decoder's.
_AOT_SHAPES = (
    *((64, 1, 96), (64, 4, 96), (16, 1, 96), (16, 4, 96), (80, 1, 96), (196, 1, 96)),
    *((64, 1, 56), (64, 4, 56), (64, 1, 72), (64, 4, 72), (16, 4, 72), (64, 1, 64), (64, 4, 64)),
    *((50, 1, 64), (196, 1, 64), (256, 1, 64), (50, 1, 32), (196, 1, 32), (256, 1, 32)),
)
_AOT_FLOAT32_SHAPES = ((64, 1, 96), (196, 1, 64))


def aot_cases() -> list[AotCase]:
    cases = []
    settings = {"num_units": "i32", "H": "i32", "scale": "fp32"}
    shapes = [("bf16", 2, *shape) for shape in _AOT_SHAPES]
    shapes += [("fp32", 4, *shape) for shape in _AOT_FLOAT32_SHAPES]
    for dtype, element_size, U, S, D in shapes:
        names = ("qkv_ptr", "out_ptr", "dout_ptr", "dqkv_ptr")
        tensors = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(
            ("lse_ptr", "delta_ptr"), "*fp32"
        )
        plans = [forward_plan(element_size, D, U, S), *backward_plans(element_size, D, U, S)]
        kernels = [_mask_unit_attention_fwd_kernel, _mask_unit_attention_bwd_tile_kernel]
        if len(plans) == 3:
            kernels[1:] = [
                _mask_unit_attention_bwd_queries_kernel,
                _mask_unit_attention_bwd_keys_kernel,
            ]
        for plan, kernel in zip(plans, kernels, strict=True):
            constexprs = plan.sizes | {"UPCASTS": False}
            signature = {k: v for k, v in (tensors | settings).items() if k in kernel.arg_names}
            variant = f"{dtype}_{U}_{S}_{D}"
            cases.append(AotCase(kernel, signature, constexprs, **plan.launch, variant=variant))
    return cases
