"""Position embeddings as the token kernels want them: one row per output token."""

import torch.nn.functional as F
from torch import Tensor


def with_prefix_rows(
    name: str, pos: Tensor, num_tokens: int, dim: int, num_prefix_tokens: int
) -> Tensor:  # [P + N, D]
    """`pos` [N, D] or [P + N, D], leading ones allowed, with zeros for prefixes without a row;
    contiguous."""
    expected = {num_tokens, num_prefix_tokens + num_tokens}
    rows = pos.numel() // max(1, dim)
    if pos.dim() < 2 or pos.shape[-1] != dim or pos.shape[-2] != rows or rows not in expected:
        sizes = " or ".join(f"[{size}, {dim}]" for size in sorted(expected))
        raise ValueError(
            f"{name} must have shape {sizes} after leading ones, got {list(pos.shape)}"
        )
    pos = pos.reshape(rows, dim).contiguous()
    return pos if rows != num_tokens else F.pad(pos, (0, 0, num_prefix_tokens, 0))
