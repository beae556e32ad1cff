"""The specification of mask_unit_pool, in eager PyTorch."""

import torch
from torch import Tensor


def mask_unit_pool(x: Tensor, unit_size: int, q_stride: int) -> Tensor:
    """[B, N, C] -> [B, N / q_stride, C]."""
    return _groups(x, unit_size, q_stride).max(2).values.flatten(1, 2)


def argmax(x: Tensor, unit_size: int, q_stride: int) -> Tensor:
    """Which member of its group each maximum is, uint8 [B, N / q_stride, C]."""
    indices = _groups(x, unit_size, q_stride).max(2).indices
    return indices.flatten(1, 2).to(torch.uint8)


def mask_unit_pool_backward(
    dout: Tensor,  # [B, N / q_stride, C]
    argmax: Tensor,  # uint8 [B, N / q_stride, C]
    unit_size: int,
    q_stride: int,
) -> Tensor:  # [B, N, C]
    batch, num_pooled, dim = dout.shape
    pooled_size = unit_size // q_stride
    shape = (batch, num_pooled // pooled_size, 1, pooled_size, dim)
    members = torch.arange(q_stride, device=dout.device).view(-1, 1, 1)
    dx = torch.where(argmax.reshape(shape) == members, dout.reshape(shape), 0)
    return dx.flatten(1, 3)


def _groups(x: Tensor, unit_size: int, q_stride: int) -> Tensor:
    """[B, units, q_stride, unit_size / q_stride, C]."""
    batch, num_tokens, dim = x.shape
    pooled_size = unit_size // q_stride
    return x.reshape(batch, num_tokens // unit_size, q_stride, pooled_size, dim)
