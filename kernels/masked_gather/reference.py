"""The specification of masked_gather, in eager PyTorch."""

import torch
from torch import Tensor


def masked_gather(
    x: Tensor,  # [B, P + N, D]
    ids_keep: Tensor,  # [B, K]
    pos: Tensor | None,  # [P + N, D]
    num_prefix_tokens: int,
) -> Tensor:  # [B, P + K, D]
    if pos is not None:
        x = x + pos
    prefix, tokens = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
    index = ids_keep.long().unsqueeze(-1).expand(-1, -1, x.shape[2])
    return torch.cat([prefix, tokens.gather(1, index)], dim=1)
