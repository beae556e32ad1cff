"""The public op fastssl::masked_patch_mse: checks, backends, fake implementation, autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import FLOAT_DTYPES, INDEX_DTYPES, check_shape, check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.masked_patch_mse import reference

MASK_DTYPES = (*FLOAT_DTYPES, torch.bool, torch.uint8, *INDEX_DTYPES)
LAYOUTS = ("hwc", "chw")


def _example(device: torch.device) -> tuple:
    pred = torch.zeros(2, 4, 12, device=device)
    return pred, torch.zeros(2, 3, 4, 4, device=device), torch.ones(2, 4, device=device)


def _why_not_images(images: Tensor) -> str | None:
    if images.requires_grad and torch.is_grad_enabled():
        return "images require a gradient, which the reference alone computes"
    return None


def cannot_run_cpp(pred: Tensor, images: Tensor, mask: Tensor) -> str | None:
    return dispatch.cannot_run_cpp(pred, images) or _why_not_images(images)


def cannot_run_triton(pred: Tensor, images: Tensor, mask: Tensor) -> str | None:
    return dispatch.cannot_run_triton(pred, images) or _why_not_images(images)


OP = dispatch.register(
    "masked_patch_mse", {"triton": cannot_run_triton, "cpp": cannot_run_cpp}, _example
)


def masked_patch_mse(
    pred: Tensor,  # [B, N, p]
    images: Tensor,  # [B, C, H, W] or [B, C, T, H, W]
    mask: Tensor,  # [B, N]
    *,
    patch_size: int | Sequence[int],
    norm_pix_loss: bool = False,
    patch_layout: str = "hwc",
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where pred or images are
    """Mean squared error of predicted patches, over the patches whose mask is not 0.

    pred [B, N, p] holds one row per patch, in row-major (t, h, w) order of the patch grid;
    patch_size is one int for every spatial dimension or one int each. A row lists its patch as
    (t, row, column, channel) with patch_layout="hwc" or as (channel, t, row, column) with "chw".
    mask [B, N] (float, bool or int) weighs the tokens: 1 counts in the loss, 0 does not; a mask of
    zeros gives loss 0 and gradient 0. images may have any strides and are never copied; pred may be
    bfloat16 beside float32 images, and gets its gradient in its own dtype. mask gets none.
    """
    check_tensor("pred", pred, dim=3)
    device = pred.device
    check_tensor("images", images, dim=(4, 5), device=device)
    check_tensor("mask", mask, dim=2, dtypes=MASK_DTYPES, device=device)
    if patch_layout not in LAYOUTS:
        raise ValueError(f"patch_layout must be 'hwc' or 'chw', got {patch_layout!r}")
    patch_size = _patch_sizes(patch_size, images)
    grid = [length // patch for length, patch in zip(images.shape[2:], patch_size, strict=True)]
    row = images.shape[1] * math.prod(patch_size)
    if norm_pix_loss and row < 2:
        raise ValueError(
            f"norm_pix_loss needs at least 2 values per patch, got patch_size {patch_size} "
            f"with {images.shape[1]} channel"
        )
    check_shape("pred", pred, (images.shape[0], math.prod(grid), row), "[B, N, p]")
    check_shape("mask", mask, pred.shape[:2], "[B, N]")
    name = dispatch.choose_backend(OP, backend, pred, images, mask)
    if name == "reference":
        return reference.masked_patch_mse(
            pred, images, mask, patch_size, norm_pix_loss, patch_layout
        )
    if images.dim() == 4:
        images, patch_size = images.unsqueeze(2), (1, *patch_size)
    # A row of pred is read as one span; rows may lie anywhere, as in pred[:, 1:].
    pred = pred if pred.stride(2) == 1 else pred.contiguous()
    loss, _, _ = torch.ops.fastssl.masked_patch_mse(
        pred,
        images,
        mask.detach().float().contiguous(),
        patch_size,
        norm_pix_loss,
        patch_layout,
        name,
    )
    return loss


def _patch_sizes(patch_size: int | Sequence[int], images: Tensor) -> tuple[int, ...]:
    """One patch size per spatial dimension, each a divisor of the images'."""
    spatial = images.shape[2:]
    is_sequence = isinstance(patch_size, Sequence)
    sizes = tuple(patch_size) if is_sequence else (patch_size,) * len(spatial)
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise TypeError(f"patch_size must be an int or a sequence of ints, got {patch_size!r}")
    if len(sizes) != len(spatial) or min(sizes) < 1:
        raise ValueError(
            f"patch_size must be at least 1 in each of {len(spatial)} dimensions, got {patch_size}"
        )
    if any(length % size for length, size in zip(spatial, sizes, strict=True)):
        raise ValueError(
            f"images must have a spatial size divisible by patch_size {sizes}, got {tuple(spatial)}"
        )
    return sizes


def _scratch(pred: Tensor) -> Tensor:
    """One float32 patch for every CPU worker that has enough to do."""
    workers = max(1, min(torch.get_num_threads(), pred.numel() // 16384))
    return pred.new_empty((workers, pred.shape[2]), dtype=torch.float32)


@custom_op("fastssl::masked_patch_mse")
def _masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: Sequence[int],
    norm_pix_loss: bool,
    patch_layout: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, each token's mean and 1/std (empty without norm_pix_loss), and 1 / sum(mask)."""
    loss, stats, inv_total = _masked_patch_mse_fake(
        pred, images, mask, patch_size, norm_pix_loss, patch_layout, backend
    )
    if backend == "reference":
        arguments = (tuple(patch_size), norm_pix_loss, patch_layout)
        loss = reference.masked_patch_mse(pred, images, mask, *arguments).float()
        return loss, stats, inv_total.zero_()
    token_losses = pred.new_empty(mask.shape, dtype=torch.float32)
    if backend == "cpp":
        torch.ops.fastssl_csrc.masked_patch_mse_fwd(
            pred,
            images,
            mask,
            *patch_size,
            patch_layout == "hwc",
            _scratch(pred),
            token_losses,
            stats if norm_pix_loss else None,
            loss,
            inv_total,
        )
    else:
        from fastssl.kernels.masked_patch_mse import triton_kernel

        triton_kernel.masked_patch_mse_fwd(
            pred,
            images,
            mask,
            patch_size,
            patch_layout == "hwc",
            token_losses,
            stats if norm_pix_loss else None,
            loss,
            inv_total,
        )
    return loss, stats, inv_total


@_masked_patch_mse.register_fake
def _masked_patch_mse_fake(pred, images, mask, patch_size, norm_pix_loss, patch_layout, backend):
    shape = (*pred.shape[:2], 2) if norm_pix_loss and backend != "reference" else (0,)
    return tuple(pred.new_empty(size, dtype=torch.float32) for size in ((), shape, ()))


@custom_op("fastssl::masked_patch_mse_backward")
def _masked_patch_mse_backward(
    dloss: Tensor,
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    stats: Tensor,
    inv_total: Tensor,
    patch_size: Sequence[int],
    norm_pix_loss: bool,
    patch_layout: str,
    backend: str,
) -> Tensor:
    dpred = pred.new_empty(pred.shape)
    known_stats = stats if norm_pix_loss else None
    if backend == "cpp":
        torch.ops.fastssl_csrc.masked_patch_mse_bwd(
            dloss,
            pred,
            images,
            mask,
            known_stats,
            inv_total,
            *patch_size,
            patch_layout == "hwc",
            _scratch(pred),
            dpred,
        )
    else:
        from fastssl.kernels.masked_patch_mse import triton_kernel

        triton_kernel.masked_patch_mse_bwd(
            dloss,
            pred,
            images,
            mask,
            known_stats,
            inv_total,
            patch_size,
            patch_layout == "hwc",
            dpred,
        )
    return dpred


@_masked_patch_mse_backward.register_fake
def _masked_patch_mse_backward_fake(dloss, pred, *_):
    return pred.new_empty(pred.shape)


def _setup_context(ctx, inputs, output):
    pred, images, mask, patch_size, norm_pix_loss, patch_layout, backend = inputs
    ctx.arguments = (tuple(patch_size), norm_pix_loss, patch_layout)
    ctx.backend = backend
    ctx.save_for_backward(pred, images, mask, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dloss, *_):
    pred, images, mask, stats, inv_total = ctx.saved_tensors
    nothing = (None,) * 4
    if ctx.backend == "reference":
        inputs = (pred, images, mask, *ctx.arguments)
        dpred, dimages, *_ = reference_gradients(ctx, reference.masked_patch_mse, inputs, dloss)
        return dpred, dimages, None, *nothing
    dpred = torch.ops.fastssl.masked_patch_mse_backward(
        dloss, pred, images, mask, stats, inv_total, *ctx.arguments, ctx.backend
    )
    return dpred, None, None, *nothing


_masked_patch_mse.register_autograd(_backward, setup_context=_setup_context)
counts_no_flops(torch.ops.fastssl.masked_patch_mse, torch.ops.fastssl.masked_patch_mse_backward)
