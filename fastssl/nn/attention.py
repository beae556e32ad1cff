"""Multi-head self-attention over all tokens."""

from collections.abc import Callable

from torch import Tensor, nn

from fastssl.nn.linear import Linear
from fastssl.nn.sdpa import self_attention


class Attention(nn.Module):
    """Self-attention of a Vision Transformer (Dosovitskiy et al., 2021): [B, N, D] -> [B, N, D].

    q, k and v of all heads lie in one projection, in this order. Keys: qkv, proj. Of `select`,
    which takes tokens out of [B, N, D], the result is that of these alone.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads={num_heads}, got {dim}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, select: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        x = self_attention(self.qkv(x), self.num_heads)
        return self.proj(x if select is None else select(x))
