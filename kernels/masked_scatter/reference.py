"""The specification of masked_scatter, in eager PyTorch."""

import torch
from torch import Tensor


def masked_scatter(
    x: Tensor,  # [B, P + K, D]
    mask_token: Tensor,  # [D]
    ids_restore: Tensor,  # [B, N]
    pos: Tensor | None,  # [P + N, D]
    num_prefix_tokens: int,
) -> Tensor:  # [B, P + N, D]
    prefix, visible = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
    batch, num_tokens = ids_restore.shape
    dim = x.shape[2]
    num_masked = num_tokens - visible.shape[1]
    shuffled = torch.cat([visible, mask_token.to(x.dtype).expand(batch, num_masked, dim)], dim=1)
    index = ids_restore.long().unsqueeze(-1).expand(-1, -1, dim)
    out = torch.cat([prefix, shuffled.gather(1, index)], dim=1)
    return out if pos is None else out + pos
