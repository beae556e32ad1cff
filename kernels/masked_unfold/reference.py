"""The specification of masked_unfold, in eager PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.kernels.masked_unfold.geometry import unit_grid


def masked_unfold(
    images: Tensor,  # [B, C, *S]
    ids_keep: Tensor,  # [B, K]
    unit_order: Tensor | Sequence[int] | None,  # [u]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    unit_size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:  # [B, K * u, C * prod(kernel_size)]
    batch, channels, *sizes = images.shape
    dims = range(len(sizes))
    units = unit_grid(sizes, kernel_size, stride, padding, unit_size)
    ids = ids_keep.long()

    kept = torch.zeros(batch, math.prod(units), dtype=torch.bool, device=images.device)
    kept = kept.scatter(1, ids, True).view(batch, 1, *units)
    for d in dims:
        pixels = torch.arange(sizes[d], device=images.device)
        unit_of_pixel = (pixels // (unit_size[d] * stride[d])).clamp(max=units[d] - 1)
        kept = kept.index_select(2 + d, unit_of_pixel)
    x = torch.where(kept, images.to(dtype), 0)

    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for d in dims:
        x = x.unfold(2 + d, kernel_size[d], stride[d])  # [B, C, *grid, *kernel_size]

    tokens = [size for pair in zip(units, unit_size, strict=True) for size in pair]
    x = x.reshape(batch, channels, *tokens, *kernel_size)
    of_units, of_tokens = [2 + 2 * d for d in dims], [3 + 2 * d for d in dims]
    x = x.permute(0, *of_units, *of_tokens, 1, *range(2 + 2 * len(dims), x.dim()))
    num_tokens, num_columns = math.prod(unit_size), channels * math.prod(kernel_size)
    x = x.reshape(batch, math.prod(units), num_tokens, num_columns)

    x = x.gather(1, ids[:, :, None, None].expand(-1, -1, num_tokens, num_columns))
    if unit_order is not None:
        x = x[:, :, torch.as_tensor(unit_order, device=images.device)]
    return x.flatten(1, 2)
