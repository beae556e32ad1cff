"""mask_unit_attention on a CPU: calls of csrc/cpu/mask_unit_attention.cpp."""

import torch
from torch import Tensor


def mask_unit_attention_fwd(
    qkv: Tensor, num_heads: int, unit_size: int, q_stride: int, out: Tensor
) -> None:
    torch.ops.fastssl_csrc.mask_unit_attention_fwd(
        qkv, num_heads, unit_size, q_stride, torch.get_num_threads(), out
    )


def mask_unit_attention_bwd(
    dout: Tensor, qkv: Tensor, num_heads: int, unit_size: int, q_stride: int, dqkv: Tensor
) -> None:
    torch.ops.fastssl_csrc.mask_unit_attention_bwd(
        dout, qkv, num_heads, unit_size, q_stride, torch.get_num_threads(), dqkv
    )
