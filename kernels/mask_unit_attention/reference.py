"""The specification of mask_unit_attention, in eager PyTorch."""

from torch import Tensor


def mask_unit_attention(
    qkv: Tensor,  # [B, N, 3 * D]
    num_heads: int,
    unit_size: int,
    q_stride: int,
) -> Tensor:  # [B, N / q_stride, D]
    batch, num_tokens, _ = qkv.shape
    # [B * N / u, u, 3, H, D / H] -> three of [B * N / u, H, u, D / H]
    units = qkv.reshape(-1, unit_size, 3, num_heads, qkv.shape[2] // (3 * num_heads))
    q, k, v = units.transpose(1, 3).unbind(2)
    if q_stride > 1:
        q = q.unflatten(2, (q_stride, -1)).max(2).values
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    out = scores.softmax(3) @ v
    return out.transpose(1, 2).reshape(batch, num_tokens // q_stride, qkv.shape[2] // 3)
