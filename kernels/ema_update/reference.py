"""The specification of ema_update, in eager PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,  # [], in place of the number
) -> None:
    wide, moved, weights = [], [], []
    for target, source in zip(targets, sources, strict=True):
        dtype = torch.promote_types(target.dtype, source.dtype)
        if target.dtype != source.dtype or momentum_tensor is not None:
            dtype = torch.promote_types(dtype, torch.float32)
        # The target itself where it has that dtype already.
        wide.append(target.to(dtype))
        moved.append(source.to(dtype))
        if momentum_tensor is not None:
            weights.append((1 - momentum_tensor).to(dtype))
    if wide:
        torch._foreach_lerp_(wide, moved, weights or 1 - momentum)
    for target, result in zip(targets, wide, strict=True):
        if result is not target:
            target.copy_(result)
