"""The specification of masked_patch_mse, in eager PyTorch."""

import torch
from torch import Tensor

EPS = 1e-6


def patchify(
    images: Tensor,  # [B, C, *S]
    patch_size: tuple[int, ...],  # one size per spatial dimension
    patch_layout: str,
) -> Tensor:  # [B, N, p]
    """Non-overlapping patches in row-major order; "hwc": channels last in a patch, "chw": first."""
    batch, channels = images.shape[:2]
    num_spatial = len(patch_size)
    sizes = [batch, channels]
    for length, patch in zip(images.shape[2:], patch_size, strict=True):
        sizes += [length // patch, patch]
    grid = [2 + 2 * i for i in range(num_spatial)]
    local = [3 + 2 * i for i in range(num_spatial)]
    inside = [*local, 1] if patch_layout == "hwc" else [1, *local]
    patches = images.reshape(sizes).permute(0, *grid, *inside)
    return patches.flatten(1 + num_spatial).flatten(1, num_spatial)


def masked_patch_mse(
    pred: Tensor,  # [B, N, p]
    images: Tensor,  # [B, C, *S]
    mask: Tensor,  # [B, N]
    patch_size: tuple[int, ...],
    norm_pix_loss: bool,
    patch_layout: str,
) -> Tensor:  # []
    dtype = torch.promote_types(torch.promote_types(pred.dtype, images.dtype), torch.float32)
    target = patchify(images, patch_size, patch_layout).to(dtype)
    if norm_pix_loss:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + EPS).sqrt()
    per_token = (pred.to(dtype) - target).square().mean(dim=-1)
    weights = mask.detach().to(dtype)
    total = weights.sum()
    return (per_token * weights).sum() / torch.where(total == 0, 1, total)
