"""masked_scatter in Triton. B images, P prefix, K visible, N all tokens, D embedding."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import (
    AotCase,
    batch_slices,
    cdiv,
    device_properties,
    next_power_of_2,
)


@dataclass(frozen=True)
class Config:
    """Tile of one program: BLOCK_N output tokens times BLOCK_D columns."""

    BLOCK_N: int = 8
    BLOCK_D: int = 256
    num_warps: int = 4


CONFIG = Config()


@triton.jit
def _source_rows(ids_ptr, b, o, N, K, P: tl.constexpr, valid):
    """Row of x that output row `o` of image `b` comes from, or -1 for the mask token."""
    is_prefix = o < P
    rank = tl.load(ids_ptr + b * N + (o - P), mask=valid & (o >= P), other=0).to(tl.int64)
    return tl.where(is_prefix, o, tl.where(rank < K, P + rank, -1))


@triton.jit
def _masked_scatter_fwd_kernel(
    x_ptr,  # [B, P + K, D]
    mask_token_ptr,  # [D] float32
    ids_ptr,  # [B, N]
    pos_ptr,  # [P + N, D] float32, unused unless HAS_POS
    out_ptr,  # [B, P + N, D]
    N,
    K,
    D,
    P: tl.constexpr,
    HAS_POS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_tiles = tl.cdiv(P + N, BLOCK_N)
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    o = (tl.program_id(0) % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    valid = o < P + N
    source = _source_rows(ids_ptr, b, o, N, K, P, valid)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    visible = (valid & (source >= 0))[:, None] & inside[None, :]
    x_rows = x_ptr + (b * (P + K) + source)[:, None] * D
    x = tl.load(x_rows + d[None, :], mask=visible, other=0.0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + d, mask=inside, other=0.0)
    out = tl.where(visible, x, mask_token[None, :])
    tile = valid[:, None] & inside[None, :]
    if HAS_POS:
        out += tl.load(pos_ptr + o[:, None] * D + d[None, :], mask=tile, other=0.0)
    out_rows = out_ptr + (b * (P + N) + o)[:, None] * D
    tl.store(out_rows + d[None, :], out.to(out_ptr.dtype.element_ty), mask=tile)


@triton.jit
def _masked_scatter_bwd_kernel(
    dout_ptr,  # [B, P + N, D]
    ids_ptr,  # [B, N]
    dx_ptr,  # [B, P + K, D]
    dmask_ptr,  # [slices, tiles, D] float32 partial sums, unused unless WANTS_MASK
    dpos_ptr,  # [slices, P + N, D] float32 partial sums, unused unless WANTS_POS
    B,
    N,
    K,
    D,
    images_per_slice,
    P: tl.constexpr,
    WANTS_MASK: tl.constexpr,
    WANTS_POS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns a tile of output positions over a slice of the batch, so every sum has one
    # fixed order and nothing is atomic.
    num_tiles = tl.cdiv(P + N, BLOCK_N)
    tile = tl.program_id(0) % num_tiles
    part = (tl.program_id(0) // num_tiles).to(tl.int64)
    o = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    valid = o < P + N
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    dmask = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dpos = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for b in range(part * images_per_slice, min(B, (part + 1) * images_per_slice)):
        source = _source_rows(ids_ptr, b, o, N, K, P, valid)
        rows = dout_ptr + (b * (P + N) + o)[:, None] * D
        dout = tl.load(rows + d[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        visible = (valid & (source >= 0))[:, None] & inside[None, :]
        dx_rows = dx_ptr + (b * (P + K) + source)[:, None] * D
        tl.store(dx_rows + d[None, :], dout.to(dx_ptr.dtype.element_ty), mask=visible)
        dout = dout.to(tl.float32)
        if WANTS_MASK:
            dmask += tl.where(visible, 0.0, dout)
        if WANTS_POS:
            dpos += dout
    if WANTS_MASK:
        row = dmask_ptr + (part * num_tiles + tile) * D
        tl.store(row + d, tl.sum(dmask, axis=0), mask=inside)
    if WANTS_POS:
        rows = dpos_ptr + (part * (P + N) + o)[:, None] * D
        tl.store(rows + d[None, :], dpos, mask=valid[:, None] & inside[None, :])


def masked_scatter_fwd(
    x: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos: Tensor | None,
    num_prefix_tokens: int,
    out: Tensor,
) -> None:
    """Fill out [B, P + N, D]; see __init__.py for the formula."""
    batch, num_rows, dim = out.shape
    if out.numel() == 0:
        return
    block_d = min(CONFIG.BLOCK_D, next_power_of_2(dim))
    grid = (batch * cdiv(num_rows, CONFIG.BLOCK_N), cdiv(dim, block_d))
    _masked_scatter_fwd_kernel[grid](
        x,
        mask_token,
        ids_restore,
        mask_token if pos is None else pos,
        out,
        ids_restore.shape[1],
        x.shape[1] - num_prefix_tokens,
        dim,
        P=num_prefix_tokens,
        HAS_POS=pos is not None,
        BLOCK_N=CONFIG.BLOCK_N,
        BLOCK_D=block_d,
        num_warps=CONFIG.num_warps,
    )


def masked_scatter_bwd(
    dout: Tensor,
    ids_restore: Tensor,
    num_prefix_tokens: int,
    dx: Tensor,
    wants_dmask_token: bool,
    wants_dpos: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill dx [B, P + K, D]; returns dmask_token [D] and dpos [P + N, D] where wanted."""
    batch, num_rows, dim = dout.shape
    block_d = min(CONFIG.BLOCK_D, next_power_of_2(max(1, dim)))
    tiles = cdiv(num_rows, CONFIG.BLOCK_N)
    columns = cdiv(dim, block_d)
    slices = batch_slices(batch, tiles * columns, device_properties(dout.device).num_processors)
    images_per_slice = cdiv(batch, slices)
    slices = cdiv(batch, max(1, images_per_slice))
    dmask = dpos = None
    if wants_dmask_token:
        dmask = dout.new_empty((slices, tiles, dim), dtype=torch.float32)
    if wants_dpos:
        dpos = dout.new_empty((slices, num_rows, dim), dtype=torch.float32)
    if dout.numel() > 0:
        _masked_scatter_bwd_kernel[(tiles * slices, columns)](
            dout,
            ids_restore,
            dx,
            dout if dmask is None else dmask,
            dout if dpos is None else dpos,
            batch,
            ids_restore.shape[1],
            dx.shape[1] - num_prefix_tokens,
            dim,
            images_per_slice,
            P=num_prefix_tokens,
            WANTS_MASK=wants_dmask_token,
            WANTS_POS=wants_dpos,
            BLOCK_N=CONFIG.BLOCK_N,
            BLOCK_D=block_d,
            num_warps=CONFIG.num_warps,
        )
    dmask_token = None if dmask is None else dmask.sum((0, 1))
    return dmask_token, None if dpos is None else dpos.sum(0)


def aot_cases() -> list[AotCase]:
    """Production shapes: bf16 tokens of a ViT-B decoder with a float32 residual stream."""
    tiles = {"BLOCK_N": CONFIG.BLOCK_N, "BLOCK_D": CONFIG.BLOCK_D}
    sizes = {"N": "i32", "K": "i32", "D": "i32"}
    return [
        AotCase(
            _masked_scatter_fwd_kernel,
            {"x_ptr": "*bf16", "mask_token_ptr": "*fp32", "ids_ptr": "*i32"}
            | {"pos_ptr": "*fp32", "out_ptr": "*fp32"}
            | sizes,
            {"P": 1, "HAS_POS": True} | tiles,
            CONFIG.num_warps,
        ),
        AotCase(
            _masked_scatter_bwd_kernel,
            {"dout_ptr": "*fp32", "ids_ptr": "*i32", "dx_ptr": "*bf16"}
            | {"dmask_ptr": "*fp32", "dpos_ptr": "*fp32", "B": "i32"}
            | sizes
            | {"images_per_slice": "i32"},
            {"P": 1, "WANTS_MASK": True, "WANTS_POS": True} | tiles,
            CONFIG.num_warps,
        ),
    ]
