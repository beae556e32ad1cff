"""The specification of linear, in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    dtype: torch.dtype,
) -> Tensor:  # [..., N]
    bias = None if bias is None else bias.to(dtype)
    return functional.linear(x.to(dtype), weight.to(dtype), bias)
