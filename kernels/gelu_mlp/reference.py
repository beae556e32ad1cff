"""The specification of gelu_mlp, in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional


def gelu_mlp(
    x: Tensor,  # [..., K]
    fc1_weight: Tensor,  # [H, K]
    fc1_bias: Tensor | None,  # [H]
    fc2_weight: Tensor,  # [N, H]
    fc2_bias: Tensor | None,  # [N]
    dtype: torch.dtype,
) -> Tensor:  # [..., N]
    biases = [None if bias is None else bias.to(dtype) for bias in (fc1_bias, fc2_bias)]
    hidden = functional.linear(x.to(dtype), fc1_weight.to(dtype), biases[0])
    return functional.linear(functional.gelu(hidden), fc2_weight.to(dtype), biases[1])
