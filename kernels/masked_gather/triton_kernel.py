"""masked_gather in Triton. B images, P prefix, K visible, N all tokens, D embedding."""

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
    """Tile of one program: BLOCK_N tokens times BLOCK_D columns."""

    BLOCK_N: int = 8
    BLOCK_D: int = 256
    num_warps: int = 4


CONFIG = Config()


@triton.jit
def _rows(ids_ptr, b, o, N, P: tl.constexpr, valid):
    """What row `o` of image `b` maps to: itself for a prefix, else P + ids[b, o - P]."""
    ids = tl.load(ids_ptr + b * N + (o - P), mask=valid & (o >= P), other=0).to(tl.int64)
    return tl.where(o < P, o, P + ids)


@triton.jit
def _masked_gather_fwd_kernel(
    x_ptr,  # [B, P + N, D]
    ids_keep_ptr,  # [B, K]
    pos_ptr,  # [P + N, D] float32, unused unless HAS_POS
    out_ptr,  # [B, P + K, D]
    N,
    K,
    D,
    P: tl.constexpr,
    HAS_POS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_tiles = tl.cdiv(P + K, BLOCK_N)
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    o = (tl.program_id(0) % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    valid = o < P + K
    source = _rows(ids_keep_ptr, b, o, K, P, valid)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = valid[:, None] & (d < D)[None, :]
    out = tl.load(x_ptr + (b * (P + N) + source)[:, None] * D + d[None, :], mask=tile, other=0.0)
    if HAS_POS:
        pos = tl.load(pos_ptr + source[:, None] * D + d[None, :], mask=tile, other=0.0)
        out = out.to(tl.float32) + pos
    out_rows = out_ptr + (b * (P + K) + o)[:, None] * D
    tl.store(out_rows + d[None, :], out.to(out_ptr.dtype.element_ty), mask=tile)


@triton.jit
def _masked_gather_bwd_kernel(
    dout_ptr,  # [B, P + K, D]
    ids_restore_ptr,  # [B, N]
    dx_ptr,  # [B, P + N, D]
    dpos_ptr,  # [slices, P + N, D] float32 partial sums, unused unless WANTS_POS
    B,
    N,
    K,
    D,
    images_per_slice,
    P: tl.constexpr,
    WANTS_POS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns a tile of token positions over a slice of the batch, so every sum has one
    # fixed order and nothing is atomic.
    num_tiles = tl.cdiv(P + N, BLOCK_N)
    part = (tl.program_id(0) // num_tiles).to(tl.int64)
    n = (tl.program_id(0) % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    valid = n < P + N
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = valid[:, None] & (d < D)[None, :]
    dpos = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for b in range(part * images_per_slice, min(B, (part + 1) * images_per_slice)):
        source = _rows(ids_restore_ptr, b, n, N, P, valid)
        visible = tile & (source < P + K)[:, None]
        rows = dout_ptr + (b * (P + K) + source)[:, None] * D
        dout = tl.load(rows + d[None, :], mask=visible, other=0.0)
        dx_rows = dx_ptr + (b * (P + N) + n)[:, None] * D
        tl.store(dx_rows + d[None, :], dout.to(dx_ptr.dtype.element_ty), mask=tile)
        if WANTS_POS:
            dpos += dout.to(tl.float32)
    if WANTS_POS:
        rows = dpos_ptr + (part * (P + N) + n)[:, None] * D
        tl.store(rows + d[None, :], dpos, mask=tile)


def masked_gather_fwd(
    x: Tensor, ids_keep: Tensor, pos: Tensor | None, num_prefix_tokens: int, out: Tensor
) -> None:
    """Fill out [B, P + K, D]; see __init__.py for the formula."""
    batch, num_rows, dim = out.shape
    if out.numel() == 0:
        return
    block_d = min(CONFIG.BLOCK_D, next_power_of_2(dim))
    grid = (batch * cdiv(num_rows, CONFIG.BLOCK_N), cdiv(dim, block_d))
    _masked_gather_fwd_kernel[grid](
        x,
        ids_keep,
        x if pos is None else pos,
        out,
        x.shape[1] - num_prefix_tokens,
        ids_keep.shape[1],
        dim,
        P=num_prefix_tokens,
        HAS_POS=pos is not None,
        BLOCK_N=CONFIG.BLOCK_N,
        BLOCK_D=block_d,
        num_warps=CONFIG.num_warps,
    )


def masked_gather_bwd(
    dout: Tensor, ids_restore: Tensor, num_prefix_tokens: int, dx: Tensor, wants_dpos: bool
) -> Tensor | None:
    """Fill dx [B, P + N, D]; returns dpos [P + N, D] if wanted."""
    batch, num_rows, dim = dx.shape
    block_d = min(CONFIG.BLOCK_D, next_power_of_2(max(1, dim)))
    tiles = cdiv(num_rows, CONFIG.BLOCK_N)
    columns = cdiv(dim, block_d)
    slices = batch
    if wants_dpos:
        processors = device_properties(dx.device).num_processors
        slices = batch_slices(batch, tiles * columns, processors)
    images_per_slice = cdiv(batch, max(1, slices))
    slices = cdiv(batch, max(1, images_per_slice))
    dpos = None
    if wants_dpos:
        dpos = dx.new_empty((slices, num_rows, dim), dtype=torch.float32)
    if dx.numel() > 0:
        _masked_gather_bwd_kernel[(tiles * slices, columns)](
            dout,
            ids_restore,
            dx,
            dx if dpos is None else dpos,
            batch,
            ids_restore.shape[1],
            dout.shape[1] - num_prefix_tokens,
            dim,
            images_per_slice,
            P=num_prefix_tokens,
            WANTS_POS=wants_dpos,
            BLOCK_N=CONFIG.BLOCK_N,
            BLOCK_D=block_d,
            num_warps=CONFIG.num_warps,
        )
    return None if dpos is None else dpos.sum(0)


def aot_cases() -> list[AotCase]:
    """Production shapes: bf16 tokens of a ViT-B encoder with a float32 residual stream."""
    tiles = {"BLOCK_N": CONFIG.BLOCK_N, "BLOCK_D": CONFIG.BLOCK_D}
    sizes = {"N": "i32", "K": "i32", "D": "i32"}
    forward = {"x_ptr": "*bf16", "ids_keep_ptr": "*i32", "pos_ptr": "*fp32", "out_ptr": "*fp32"}
    backward = {"dout_ptr": "*fp32", "ids_restore_ptr": "*i32", "dx_ptr": "*bf16"}
    backward |= {"dpos_ptr": "*fp32", "B": "i32"} | sizes | {"images_per_slice": "i32"}
    return [
        AotCase(
            _masked_gather_fwd_kernel,
            forward | sizes,
            {"P": 1, "HAS_POS": True} | tiles,
            CONFIG.num_warps,
        ),
        AotCase(
            _masked_gather_bwd_kernel,
            backward,
            {"P": 1, "WANTS_POS": False} | tiles,
            CONFIG.num_warps,
        ),
        AotCase(
            _masked_gather_bwd_kernel,
            backward,
            {"P": 1, "WANTS_POS": True} | tiles,
            CONFIG.num_warps,
            variant="dpos",
        ),
    ]
