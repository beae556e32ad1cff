"""The truth of a masked patch embedding: a convolution of the masked image, and kept tokens."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_grid(images: Tensor, kernel_size, stride, padding, unit_size) -> list[int]:
    grid = torch.empty(1, 1, *images.shape[2:], device="meta")
    conv = {4: F.conv2d, 5: F.conv3d}[images.dim()]
    weight = torch.empty(1, 1, *kernel_size, device="meta")
    grid = conv(grid, weight, None, stride, padding).shape[2:]
    return [g // u for g, u in zip(grid, unit_size, strict=True)]


def pixel_mask(images: Tensor, ids_keep: Tensor, units, stride, unit_size) -> Tensor:
    """1 where a pixel's unit is kept, [B, 1, *S]."""
    mask = torch.zeros(len(images), 1, *images.shape[2:], dtype=images.dtype)
    all_units = list(itertools.product(*(range(n) for n in units)))
    for b, unit in itertools.product(range(len(images)), range(ids_keep.shape[1])):
        where = [b, 0]
        for d, index in enumerate(all_units[ids_keep[b, unit]]):
            start = index * unit_size[d] * stride[d]
            is_last = index == units[d] - 1
            where.append(slice(start, None if is_last else start + unit_size[d] * stride[d]))
        mask[tuple(where)] = 1
    return mask.to(images.device)


def masked_convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids_keep: Tensor,
    *,
    stride,
    padding,
    unit_size,
    unit_order=None,
) -> Tensor:  # [B, K * u, D]
    """conv(images * mask) as the official Hiera computes it, then the kept units' tokens."""
    units = unit_grid(images, weight.shape[2:], stride, padding, unit_size)
    mask = pixel_mask(images, ids_keep, units, stride, unit_size)
    conv = {4: F.conv2d, 5: F.conv3d}[images.dim()]
    out = conv(images * mask, weight, bias, stride, padding)
    all_units = list(itertools.product(*(range(n) for n in units)))
    rows = []
    for b in range(len(images)):
        for unit in ids_keep[b].tolist():
            tokens = [
                slice(index * u, (index + 1) * u)
                for index, u in zip(all_units[unit], unit_size, strict=True)
            ]
            tokens = out[(b, slice(None), *tokens)].flatten(1).T
            rows.append(tokens if unit_order is None else tokens[list(unit_order)])
    if not rows:
        return out.new_zeros(len(images), 0, weight.shape[0])
    return torch.stack(rows).reshape(len(images), -1, weight.shape[0])
