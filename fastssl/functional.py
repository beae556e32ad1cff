"""The ops, as functions: fused where the device allows, eager PyTorch everywhere else.

Every function takes `backend=None` (or FASTSSL_BACKEND): "triton", "cpp" or "reference" by name,
which raises the reason where that one cannot run, or None for the fastest that can.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.kernels.add_layer_norm import add_layer_norm
from fastssl.kernels.augment_views import augment_views
from fastssl.kernels.barlow_twins import barlow_twins
from fastssl.kernels.common.checks import check_shape, check_tensor
from fastssl.kernels.covariance_loss import covariance_loss
from fastssl.kernels.dino_cross_entropy import dino_cross_entropy
from fastssl.kernels.ema_update import ema_update
from fastssl.kernels.gelu_mlp import gelu_mlp
from fastssl.kernels.gram_loss import gram_loss
from fastssl.kernels.info_nce import info_nce
from fastssl.kernels.keyed_uniform import keyed_uniform
from fastssl.kernels.koleo import koleo
from fastssl.kernels.linear import linear
from fastssl.kernels.linear_dino_cross_entropy import linear_dino_cross_entropy
from fastssl.kernels.mask_unit_attention import mask_unit_attention
from fastssl.kernels.mask_unit_pool import mask_unit_pool
from fastssl.kernels.masked_gather import masked_gather
from fastssl.kernels.masked_patch_mse import masked_patch_mse
from fastssl.kernels.masked_scatter import masked_scatter
from fastssl.kernels.masked_unfold import masked_unfold
from fastssl.kernels.nt_xent import nt_xent
from fastssl.kernels.random_masking import random_masking
from fastssl.kernels.sinkhorn_knopp import sinkhorn_knopp
from fastssl.kernels.vicreg import vicreg

# What a keyed random number is for: each use draws from a stream of its own.
STREAM_MASK, STREAM_CROP, STREAM_SHUFFLE, STREAM_EVAL = range(4)
STREAM_REGION, STREAM_METHOD, STREAM_TIME, STREAM_DROP = range(4, 8)

__all__ = [
    "STREAM_CROP",
    "STREAM_DROP",
    "STREAM_EVAL",
    "STREAM_MASK",
    "STREAM_METHOD",
    "STREAM_REGION",
    "STREAM_SHUFFLE",
    "STREAM_TIME",
    "add_layer_norm",
    "augment_views",
    "barlow_twins",
    "covariance_loss",
    "dino_cross_entropy",
    "ema_update",
    "gelu_mlp",
    "gram_loss",
    "info_nce",
    "keyed_uniform",
    "koleo",
    "linear",
    "linear_dino_cross_entropy",
    "mask_unit_attention",
    "mask_unit_pool",
    "masked_gather",
    "masked_patch_embed",
    "masked_patch_mse",
    "masked_scatter",
    "masked_unfold",
    "nt_xent",
    "random_masking",
    "sinkhorn_knopp",
    "vicreg",
]


def masked_patch_embed(
    images: Tensor,  # [B, C, *S], 2 or 3 spatial dimensions
    weight: Tensor,  # [D, C, *kernel_size]
    bias: Tensor | None,  # [D]
    ids_keep: Tensor,  # [B, K]
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    unit_size: int | Sequence[int] = 1,
    unit_order: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, K * u, D]
    """The convolution of a patch embedding, at the tokens of the visible mask units only.

    Equals `conv(images * mask, weight, bias, stride, padding)` at the tokens of the units that
    `ids_keep` names, with the mask of those units at the resolution of the pixels; arguments as in
    `masked_unfold`. Only the visible patches are cut out and multiplied. The product runs in the
    autocast dtype where autocast is on, otherwise in the weight's; the patches, B * K * u * C *
    prod(kernel_size) elements of that dtype, are all that is saved for the weight's gradient.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    check_tensor("images", images, dim=(4, 5))
    check_tensor("weight", weight, dim=images.dim(), device=images.device)
    kernel_size = weight.shape[2:]
    check_shape("weight", weight, (None, images.shape[1], *kernel_size), "[D, C, *kernel_size]")
    if bias is not None:
        check_tensor("bias", bias, dim=1, device=images.device)
        check_shape("bias", bias, (weight.shape[0],), "[D]")
    dtype, device_type = weight.dtype, images.device.type
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    patches = masked_unfold(
        images,
        ids_keep,
        kernel_size=tuple(kernel_size),
        stride=stride,
        padding=padding,
        unit_size=unit_size,
        unit_order=unit_order,
        dtype=dtype,
        backend=backend,
    )
    return F.linear(patches, weight.flatten(1), bias)
