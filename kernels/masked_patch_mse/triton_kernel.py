"""masked_patch_mse in Triton. B images, N patches, p = C * pt * ph * pw values in a patch."""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, next_power_of_2
from fastssl.kernels.masked_patch_mse.reference import EPS

_EPS = tl.constexpr(EPS)


@dataclass(frozen=True)
class Config:
    """One program per token; a row of up to `VALUES_PER_WARP` values to each warp."""

    VALUES_PER_WARP: int = 256
    MAX_WARPS: int = 8
    REDUCE_BLOCK: int = 1024
    REDUCE_WARPS: int = 4


CONFIG = Config()


@triton.jit
def _patch_offsets(
    i,
    j,
    N,
    grid_h,
    grid_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Offsets in the images of values `j` of token `i`, both in the prediction's order."""
    b, n = (i // N).to(tl.int64), i % N
    w = (n % grid_w).to(tl.int64) * PW
    h = (n // grid_w % grid_h).to(tl.int64) * PH
    t = (n // (grid_w * grid_h)).to(tl.int64) * PT
    first = b * stride_b + t * stride_t + h * stride_h + w * stride_w
    if CHANNELS_LAST:
        c, x, rest = j % C, j // C % PW, j // (C * PW)
        y, frame = rest % PH, rest // PH
    else:
        x, y, frame, c = j % PW, j // PW % PH, j // (PW * PH) % PT, j // (PW * PH * PT)
    return (
        first
        + c.to(tl.int64) * stride_c
        + frame.to(tl.int64) * stride_t
        + y.to(tl.int64) * stride_h
        + x.to(tl.int64) * stride_w
    )


@triton.jit
def _masked_patch_mse_fwd_kernel(
    pred_ptr,  # [B, N, p], rows of p values
    images_ptr,  # [B, C, T, H, W], any strides
    mask_ptr,  # [B, N] float32
    losses_ptr,  # [B, N] float32
    stats_ptr,  # [B, N, 2] float32, unused unless NORM
    N,
    grid_h,
    grid_w,
    stride_pb,
    stride_pn,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    P: tl.constexpr = C * PT * PH * PW
    i = tl.program_id(0)
    j = tl.arange(0, BLOCK_P)
    # A token outside the loss loads nothing: its values count as zeros.
    inside = j < tl.where(tl.load(mask_ptr + i) == 0, 0, P)
    offsets = _patch_offsets(
        i,
        j,
        N,
        grid_h,
        grid_w,
        stride_b,
        stride_c,
        stride_t,
        stride_h,
        stride_w,
        C,
        PT,
        PH,
        PW,
        CHANNELS_LAST,
    )
    target = tl.load(images_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(target, axis=0) / P
        # What the rounded mean leaves over corrects it and the variance (corrected two-pass).
        centered = tl.where(inside, target - mean, 0.0)
        rest = tl.sum(centered, axis=0)
        var = (tl.sum(centered * centered, axis=0) - rest * rest / P) / (P - 1)
        mean += rest / P
        inv_std = 1.0 / tl.sqrt(tl.maximum(var, 0.0) + _EPS)
        tl.store(stats_ptr + 2 * i.to(tl.int64), mean)
        tl.store(stats_ptr + 2 * i.to(tl.int64) + 1, inv_std)
        target = (target - mean) * inv_std
    row = pred_ptr + (i // N).to(tl.int64) * stride_pb + (i % N).to(tl.int64) * stride_pn
    pred = tl.load(row + j, mask=inside, other=0.0).to(tl.float32)
    error = tl.where(inside, pred - target, 0.0)
    tl.store(losses_ptr + i, tl.sum(error * error, axis=0) / P)


@triton.jit
def _masked_patch_mse_reduce_kernel(
    losses_ptr,  # [num_tokens] float32
    mask_ptr,  # [num_tokens] float32
    loss_ptr,  # [] float32
    inv_total_ptr,  # [] float32
    num_tokens,
    BLOCK: tl.constexpr,
):
    # One program adds everything up: the order is fixed and no second launch or atomic is needed.
    lane = tl.arange(0, BLOCK)
    losses = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tokens, BLOCK):
        i = start + lane
        weight = tl.load(mask_ptr + i, mask=i < num_tokens, other=0.0)
        losses += weight * tl.load(losses_ptr + i, mask=i < num_tokens, other=0.0)
        weights += weight
    total = tl.sum(weights, axis=0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(loss_ptr, tl.sum(losses, axis=0) * inverse)
    tl.store(inv_total_ptr, inverse)


@triton.jit
def _masked_patch_mse_bwd_kernel(
    dloss_ptr,  # [] float32
    pred_ptr,  # [B, N, p], rows of p values
    images_ptr,  # [B, C, T, H, W], any strides
    mask_ptr,  # [B, N] float32
    stats_ptr,  # [B, N, 2] float32, unused unless NORM
    inv_total_ptr,  # [] float32
    dpred_ptr,  # [B, N, p] contiguous
    N,
    grid_h,
    grid_w,
    stride_pb,
    stride_pn,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    P: tl.constexpr = C * PT * PH * PW
    i = tl.program_id(0)
    j = tl.arange(0, BLOCK_P)
    weight = tl.load(mask_ptr + i)
    inside = j < tl.where(weight == 0, 0, P)
    offsets = _patch_offsets(
        i,
        j,
        N,
        grid_h,
        grid_w,
        stride_b,
        stride_c,
        stride_t,
        stride_h,
        stride_w,
        C,
        PT,
        PH,
        PW,
        CHANNELS_LAST,
    )
    target = tl.load(images_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.load(stats_ptr + 2 * i.to(tl.int64))
        target = (target - mean) * tl.load(stats_ptr + 2 * i.to(tl.int64) + 1)
    row = pred_ptr + (i // N).to(tl.int64) * stride_pb + (i % N).to(tl.int64) * stride_pn
    pred = tl.load(row + j, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(dloss_ptr) * tl.load(inv_total_ptr) * weight * (2.0 / P)
    dpred = tl.where(inside, scale * (pred - target), 0.0)
    to = dpred_ptr + i.to(tl.int64) * P + j
    tl.store(to, dpred.to(dpred_ptr.dtype.element_ty), mask=j < P)


def _constexprs(
    channels: int, patch_size: Sequence[int], channels_last: bool, norm: bool
) -> dict[str, object]:
    frames, height, width = patch_size
    block = next_power_of_2(channels * frames * height * width)
    patch = {"C": channels, "PT": frames, "PH": height, "PW": width}
    return {**patch, "CHANNELS_LAST": channels_last, "NORM": norm, "BLOCK_P": block}


def _num_warps(block: int) -> int:
    return max(1, min(CONFIG.MAX_WARPS, block // CONFIG.VALUES_PER_WARP))


def _geometry(pred: Tensor, images: Tensor, patch_size: Sequence[int]) -> tuple[int, ...]:
    grid_h, grid_w = images.shape[3] // patch_size[1], images.shape[4] // patch_size[2]
    return (pred.shape[1], grid_h, grid_w, pred.stride(0), pred.stride(1), *images.stride())


def masked_patch_mse_fwd(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: Sequence[int],
    channels_last: bool,
    token_losses: Tensor,
    stats: Tensor | None,
    loss: Tensor,
    inv_total: Tensor,
) -> None:
    """Fill token_losses and stats per token, then loss and inv_total = 1 / sum(mask)."""
    constexprs = _constexprs(images.shape[1], patch_size, channels_last, stats is not None)
    if mask.numel() > 0:
        _masked_patch_mse_fwd_kernel[(mask.numel(),)](
            pred,
            images,
            mask,
            token_losses,
            token_losses if stats is None else stats,
            *_geometry(pred, images, patch_size),
            **constexprs,
            num_warps=_num_warps(constexprs["BLOCK_P"]),
        )
    _masked_patch_mse_reduce_kernel[(1,)](
        token_losses,
        mask,
        loss,
        inv_total,
        mask.numel(),
        BLOCK=CONFIG.REDUCE_BLOCK,
        num_warps=CONFIG.REDUCE_WARPS,
    )


def masked_patch_mse_bwd(
    dloss: Tensor,
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    stats: Tensor | None,
    inv_total: Tensor,
    patch_size: Sequence[int],
    channels_last: bool,
    dpred: Tensor,
) -> None:
    """Fill dpred [B, N, p], zeros where the mask is 0."""
    constexprs = _constexprs(images.shape[1], patch_size, channels_last, stats is not None)
    if mask.numel() > 0:
        _masked_patch_mse_bwd_kernel[(mask.numel(),)](
            dloss,
            pred,
            images,
            mask,
            mask if stats is None else stats,
            inv_total,
            dpred,
            *_geometry(pred, images, patch_size),
            **constexprs,
            num_warps=_num_warps(constexprs["BLOCK_P"]),
        )


def aot_cases() -> list[AotCase]:
    """16x16 and 14x14 RGB patches, and 2x16x16 of a clip; bf16 predictions, float32 images."""
    sizes = ("N", "grid_h", "grid_w", "stride_pb", "stride_pn")
    strides = ("stride_b", "stride_c", "stride_t", "stride_h", "stride_w")
    geometry = dict.fromkeys((*sizes, *strides), "i32")
    inputs = {"pred_ptr": "*bf16", "images_ptr": "*fp32", "mask_ptr": "*fp32"}
    forward = {**inputs, "losses_ptr": "*fp32", "stats_ptr": "*fp32", **geometry}
    backward = {"dloss_ptr": "*fp32", **inputs, "stats_ptr": "*fp32", "inv_total_ptr": "*fp32"}
    backward |= {"dpred_ptr": "*bf16", **geometry}
    cases = [
        AotCase(
            _masked_patch_mse_reduce_kernel,
            dict.fromkeys(("losses_ptr", "mask_ptr", "loss_ptr", "inv_total_ptr"), "*fp32")
            | {"num_tokens": "i32"},
            {"BLOCK": CONFIG.REDUCE_BLOCK},
            CONFIG.REDUCE_WARPS,
        )
    ]
    for patch_size in ((1, 16, 16), (1, 14, 14), (2, 16, 16)):
        constexprs = _constexprs(3, patch_size, True, True)
        warps = _num_warps(constexprs["BLOCK_P"])
        variant = "x".join(map(str, patch_size))
        for kernel, signature in (
            (_masked_patch_mse_fwd_kernel, forward),
            (_masked_patch_mse_bwd_kernel, backward),
        ):
            cases.append(AotCase(kernel, signature, constexprs, warps, variant=variant))
    return cases
