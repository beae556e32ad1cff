"""Multi-head self-attention over all tokens."""

from torch import Tensor, nn

from fastssl.nn.sdpa import attend


class Attention(nn.Module):
    """Self-attention of a Vision Transformer (Dosovitskiy et al., 2021): [B, N, D] -> [B, N, D].

    q, k and v of all heads lie in one projection, in this order. Keys: qkv, proj.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads={num_heads}, got {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3, H, D/H] -> three of [B, H, N, D/H]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        x = attend(q, k, v)  # [B, H, N, D/H]
        return self.proj(x.transpose(1, 2).flatten(2))
