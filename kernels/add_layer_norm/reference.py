"""The specification of add_layer_norm, in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_layer_norm(
    x: Tensor,  # [B, ..., D]
    branch: Tensor | None,  # as x
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    gamma: Tensor | None,  # [D]
    scale: Tensor | None,  # [B]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # residual and normed, both as x
    residual = x
    if branch is not None:
        residual_dtype = torch.promote_types(x.dtype, branch.dtype)
        if gamma is not None:
            branch = branch * gamma
        if scale is not None:
            branch = branch * scale.view(-1, *(1,) * (x.dim() - 1))
        residual = (x + branch).to(residual_dtype)
    exact = torch.promote_types(residual.dtype, torch.float32)
    weight, bias = weight.to(exact), bias.to(exact)
    normed = F.layer_norm(residual.to(exact), weight.shape, weight, bias, eps)
    return residual, normed.to(dtype)
