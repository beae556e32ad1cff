"""The specification of random_masking, in eager PyTorch."""

import torch
from torch import Tensor


def random_masking(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """noise [B, N] -> ids_keep [B, len_keep], ids_restore [B, N], mask [B, N]."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= len_keep).float()
    return ids_shuffle[:, :len_keep].to(torch.int32), ids_restore.to(torch.int32), mask
