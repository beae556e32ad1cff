"""masked_unfold in Triton. B images of C channels, T x H x W pixels, K units kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, cdiv, next_power_of_2
from fastssl.kernels.masked_unfold.geometry import unit_grid


@dataclass(frozen=True)
class Config:
    """Tile of one program: BLOCK_N tokens times BLOCK_C columns, or BLOCK_P pixels.

    64 columns leave a quarter of the lanes idle at Hiera's 147, where 128 would leave 43 %.
    """

    BLOCK_N: int = 16
    BLOCK_C: int = 64
    BLOCK_P: int = 256
    num_warps: int = 4


CONFIG = Config()


@triton.jit
def _unit_of(y, PIXELS: tl.constexpr, num_units):
    """The unit of PIXELS pixels that pixel `y` belongs to; the last owns what is left over."""
    return tl.minimum(y // PIXELS, num_units - 1)


@triton.jit
def _masked_unfold_fwd_kernel(
    images_ptr,  # [B, C, T, H, W] by strides
    ids_ptr,  # [B, K]
    order_ptr,  # [u] int32, unused unless HAS_ORDER
    ranks_ptr,  # [B, U] int32, negative where a unit is not kept, unused unless MASKED
    out_ptr,  # [B, K * u, C * KT * KH * KW]
    num_tokens,  # B * K * u
    K,
    T,
    H,
    W,
    units_t,
    units_h,
    units_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    NUM_COLUMNS: tl.constexpr,
    KT: tl.constexpr,  # kernel size
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,  # stride
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,  # padding
    PH: tl.constexpr,
    PW: tl.constexpr,
    UT: tl.constexpr,  # tokens of a unit
    UH: tl.constexpr,
    UW: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Rows: the first pixel of each token's window. It may lie in the padding.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < num_tokens
    kept, local = n // (UT * UH * UW), n % (UT * UH * UW)
    b = (kept // K).to(tl.int64)
    unit = tl.load(ids_ptr + kept, mask=valid, other=0).to(tl.int32)
    if HAS_ORDER:
        local = tl.load(order_ptr + local)
    t0 = (unit // (units_h * units_w) * UT + local // (UH * UW)) * ST - PT
    y0 = (unit // units_w % units_h * UH + local // UW % UH) * SH - PH
    x0 = (unit % units_w * UW + local % UW) * SW - PW
    row = b * stride_b + t0.to(tl.int64) * stride_t + y0.to(tl.int64) * stride_h
    row += x0.to(tl.int64) * stride_w
    # Columns: the offset within the window.
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dt, dy, dx = column // (KH * KW) % KT, column // KW % KH, column % KW
    channel = (column // (KT * KH * KW)).to(tl.int64)
    offset = channel * stride_c + dt.to(tl.int64) * stride_t + dy.to(tl.int64) * stride_h
    offset += dx.to(tl.int64) * stride_w

    tile = valid[:, None] & (column < NUM_COLUMNS)[None, :]
    t, y, x = t0[:, None] + dt[None, :], y0[:, None] + dy[None, :], x0[:, None] + dx[None, :]
    visible = tile & (t >= 0) & (t < T) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    if MASKED:
        owner = _unit_of(t, UT * ST, units_t) * units_h + _unit_of(y, UH * SH, units_h)
        owner = owner * units_w + _unit_of(x, UW * SW, units_w)
        ranks = ranks_ptr + b[:, None] * (units_t * units_h * units_w)
        visible = visible & (tl.load(ranks + owner, mask=visible, other=-1) >= 0)
    pixels = tl.load(images_ptr + (row[:, None] + offset[None, :]), mask=visible, other=0.0)
    out = out_ptr + n.to(tl.int64)[:, None] * NUM_COLUMNS + column[None, :]
    tl.store(out, pixels.to(out_ptr.dtype.element_ty), mask=tile)


@triton.jit
def _masked_unfold_bwd_kernel(
    dout_ptr,  # [B, K * u, C * KT * KH * KW]
    ranks_ptr,  # [B, U] int32, the unit's position in ids_keep or -1
    positions_ptr,  # [u] int32, the token's position in its unit, unused unless HAS_ORDER
    dimages_ptr,  # [B, C, T, H, W]
    K,
    C,
    T,
    H,
    W,
    units_t,
    units_h,
    units_w,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    UT: tl.constexpr,
    UH: tl.constexpr,
    UW: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_CH: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    # Every pixel sums the windows that hold it, in row-major order of their tokens.
    num_tiles = tl.cdiv(T * H * W, BLOCK_P)
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    p = tl.program_id(0) % num_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < T * H * W
    t, y, x = p // (H * W), p // W % H, p % W
    ranks = ranks_ptr + b * (units_t * units_h * units_w)
    owner = _unit_of(t, UT * ST, units_t) * units_h + _unit_of(y, UH * SH, units_h)
    owner = owner * units_w + _unit_of(x, UW * SW, units_w)
    kept = tl.load(ranks + owner, mask=inside, other=-1) >= 0
    c = tl.program_id(1) * BLOCK_CH + tl.arange(0, BLOCK_CH)
    sums = tl.zeros((BLOCK_CH, BLOCK_P), tl.float32)
    # At most cdiv(kernel, stride) windows hold a pixel along one dimension: the last that starts
    # at or before it, and those before that one.
    HOLD_T: tl.constexpr = (KT + ST - 1) // ST
    HOLD_H: tl.constexpr = (KH + SH - 1) // SH
    HOLD_W: tl.constexpr = (KW + SW - 1) // SW
    for i in tl.static_range(HOLD_T * HOLD_H * HOLD_W):
        token_t = (t + PT) // ST - (HOLD_T - 1 - i // (HOLD_H * HOLD_W))
        token_y = (y + PH) // SH - (HOLD_H - 1 - i // HOLD_W % HOLD_H)
        token_x = (x + PW) // SW - (HOLD_W - 1 - i % HOLD_W)
        dt, dy, dx = t + PT - token_t * ST, y + PH - token_y * SH, x + PW - token_x * SW
        held = kept & (dt < KT) & (dy < KH) & (dx < KW)
        held = held & (token_t >= 0) & (token_t < units_t * UT)
        held = held & (token_y >= 0) & (token_y < units_h * UH)
        held = held & (token_x >= 0) & (token_x < units_w * UW)
        unit = (token_t // UT * units_h + token_y // UH) * units_w + token_x // UW
        rank = tl.load(ranks + unit, mask=held, other=-1)
        held = held & (rank >= 0)
        local = (token_t % UT * UH + token_y % UH) * UW + token_x % UW
        if HAS_ORDER:
            local = tl.load(positions_ptr + local, mask=held, other=0)
        token = (b * K + rank) * (UT * UH * UW) + local
        window = token * C * (KT * KH * KW) + (dt * KH + dy) * KW + dx
        values = dout_ptr + window[None, :] + c[:, None] * (KT * KH * KW)
        sums += tl.load(values, mask=held[None, :] & (c < C)[:, None], other=0.0).to(tl.float32)
    out = dimages_ptr + (b * C + c)[:, None] * (T * H * W) + p[None, :]
    tile = (c < C)[:, None] & inside[None, :]
    tl.store(out, sums.to(dimages_ptr.dtype.element_ty), mask=tile)


def unit_ranks(ids_keep: Tensor, num_units: int) -> Tensor:  # [B, U] int32
    """The position of each unit in its row of ids_keep, -1 if it is not kept."""
    batch, num_kept = ids_keep.shape
    ranks = ids_keep.new_full((batch, num_units), -1, dtype=torch.int32)
    order = torch.arange(num_kept, dtype=torch.int32, device=ids_keep.device)
    return ranks.scatter_(1, ids_keep.long(), order.expand(batch, -1))


def _constants(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    unit_size: Sequence[int],
) -> dict[str, int]:
    names = [letter + axis for letter in "KSPU" for axis in ("T", "H", "W")]
    return dict(zip(names, (*kernel_size, *stride, *padding, *unit_size), strict=True))


def masked_unfold_fwd(
    images: Tensor,
    ids_keep: Tensor,
    unit_order: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    unit_size: Sequence[int],
    masked: bool,
    out: Tensor,
) -> None:
    """Fill out [B, K * u, columns]; `masked`: windows may reach into units that are not kept."""
    if out.numel() == 0:
        return
    geometry = (kernel_size, stride, padding, unit_size)
    units = unit_grid(images.shape[2:], *geometry)
    num_tokens, num_columns = out.shape[0] * out.shape[1], out.shape[2]
    block_c = min(CONFIG.BLOCK_C, next_power_of_2(num_columns))
    grid = (cdiv(num_tokens, CONFIG.BLOCK_N), cdiv(num_columns, block_c))
    _masked_unfold_fwd_kernel[grid](
        images,
        ids_keep,
        ids_keep if unit_order is None else unit_order,
        unit_ranks(ids_keep, math.prod(units)) if masked else ids_keep,
        out,
        num_tokens,
        ids_keep.shape[1],
        *images.shape[2:],
        *units,
        *images.stride(),
        NUM_COLUMNS=num_columns,
        **_constants(*geometry),
        HAS_ORDER=unit_order is not None,
        MASKED=masked,
        BLOCK_N=CONFIG.BLOCK_N,
        BLOCK_C=block_c,
        num_warps=CONFIG.num_warps,
    )


def masked_unfold_bwd(
    dout: Tensor,
    ids_keep: Tensor,
    unit_order: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    unit_size: Sequence[int],
    dimages: Tensor,
) -> None:
    """Fill dimages [B, C, T, H, W]."""
    if dimages.numel() == 0:
        return
    batch, channels, *sizes = dimages.shape
    geometry = (kernel_size, stride, padding, unit_size)
    units = unit_grid(sizes, *geometry)
    block_ch = min(4, next_power_of_2(channels))
    grid = (batch * cdiv(math.prod(sizes), CONFIG.BLOCK_P), cdiv(channels, block_ch))
    _masked_unfold_bwd_kernel[grid](
        dout,
        unit_ranks(ids_keep, math.prod(units)),
        ids_keep if unit_order is None else unit_order.argsort().int(),
        dimages,
        ids_keep.shape[1],
        channels,
        *sizes,
        *units,
        **_constants(*geometry),
        HAS_ORDER=unit_order is not None,
        BLOCK_CH=block_ch,
        BLOCK_P=CONFIG.BLOCK_P,
        num_warps=CONFIG.num_warps,
    )


# Production geometries: kernel size, stride, padding, tokens of a unit.
VIT_16 = ((1, 16, 16), (1, 16, 16), (0, 0, 0), (1, 1, 1))
HIERA = ((1, 7, 7), (1, 4, 4), (0, 3, 3), (1, 8, 8))
HIERA_VIDEO = ((3, 7, 7), (2, 4, 4), (1, 3, 3), (1, 8, 8))


def aot_cases() -> list[AotCase]:
    """float32 images of three channels to bf16 patches: ViT-B/16, Hiera's images, Hiera's clips."""
    sizes = dict.fromkeys(("T", "H", "W", "units_t", "units_h", "units_w"), "i32")
    strides = {f"stride_{axis}": "i32" for axis in "bcthw"}
    cases = []
    for variant, geometry in (("vit", VIT_16), ("hiera", HIERA), ("hiera_video", HIERA_VIDEO)):
        is_hiera = variant != "vit"
        constants = {**_constants(*geometry), "HAS_ORDER": is_hiera}
        if variant != "hiera_video":  # a run-time argument of 1 is a constant to Triton
            constants |= {"T": 1, "units_t": 1}
        forward = AotCase(
            _masked_unfold_fwd_kernel,
            {"images_ptr": "*fp32", "ids_ptr": "*i32", "order_ptr": "*i32", "ranks_ptr": "*i32"}
            | {"out_ptr": "*bf16", "num_tokens": "i32", "K": "i32"}
            | sizes
            | strides,
            {"NUM_COLUMNS": 3 * math.prod(geometry[0]), "MASKED": is_hiera, "stride_w": 1}
            | {"BLOCK_N": CONFIG.BLOCK_N, "BLOCK_C": CONFIG.BLOCK_C}
            | constants,
            CONFIG.num_warps,
            variant=variant,
        )
        backward = AotCase(
            _masked_unfold_bwd_kernel,
            {"dout_ptr": "*bf16", "ranks_ptr": "*i32", "positions_ptr": "*i32"}
            | {"dimages_ptr": "*fp32", "K": "i32", "C": "i32"}
            | sizes,
            {"BLOCK_CH": 4, "BLOCK_P": CONFIG.BLOCK_P, **constants},
            CONFIG.num_warps,
            variant=variant,
        )
        cases += [forward, backward]
    return cases
