"""Stochastic depth (Huang et al., 2016, arXiv:1603.09382)."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero the whole residual branch of a sample with probability `drop_prob` while training.

    The branches kept are divided by 1 - drop_prob, so that the expectation stays. Input
    [B, ...] of any shape; the identity in evaluation and for `drop_prob=0`.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob)
        return x * keep.div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
