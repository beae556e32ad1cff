"""The gated feed-forward layer (Shazeer, 2020, arXiv:2002.05202), as in DINOv2's largest models."""

from torch import Tensor, nn

from fastssl.nn.linear import Linear


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with a, b the halves of w12(x): [..., in_features] -> [..., out_features].

    `hidden_features`, by default `in_features`, is the hidden width of an Mlp with as many
    parameters: a and b have two thirds of it, rounded up to a multiple of 8 as in DINOv2
    (arXiv:2304.07193). Keys: w12, w3.
    """

    def __init__(
        self, in_features: int, hidden_features: int | None = None, out_features: int | None = None
    ) -> None:
        super().__init__()
        hidden_features = (int((hidden_features or in_features) * 2 / 3) + 7) // 8 * 8
        self.w12 = Linear(in_features, 2 * hidden_features)
        self.w3 = Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(a) * b)
