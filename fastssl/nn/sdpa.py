"""Scaled dot-product attention, by whichever formula is fast where it runs."""

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's CUDA kernels put the batch into a grid dimension that ends here (pytorch #142228).
MAX_BATCH = 65_535
# Above this many keys the written-out scores take too much memory to be worth their speed.
MAX_EXPLICIT_KEYS = 1024


def attend(
    q: Tensor,  # [B, H, N, D/H]
    k: Tensor,  # [B, H, M, D/H]
    v: Tensor,  # [B, H, M, D/H]
) -> Tensor:  # [B, H, N, D/H]
    """softmax(q k^T / sqrt(D/H)) v, by torch's fused attention.

    Except in training in half precision on a CPU, which writes the scores out: there the backward
    of torch's fused kernel takes 3 to 10 times as long (torch 2.13, 16 to 196 tokens).
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    explicit = half and q.device.type == "cpu" and k.shape[2] <= MAX_EXPLICIT_KEYS
    if explicit and torch.is_grad_enabled() and q.requires_grad:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return scores.softmax(dim=3) @ v
    if q.shape[0] > MAX_BATCH:
        parts = zip(q.split(MAX_BATCH), k.split(MAX_BATCH), v.split(MAX_BATCH), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v)
