"""Stochastic depth (Huang et al., 2016, arXiv:1603.09382)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Above this rate the branch is computed for the samples that keep it only, as in DINOv2.
MAX_RATE_COMPUTED = 0.1


class DropPath(nn.Module):
    """Zero the whole residual branch of a sample with probability `drop_prob` while training.

    The branches kept are divided by 1 - drop_prob, so that the expectation stays. Input
    [B, ...] of any shape; the identity in evaluation and for `drop_prob=0`. Called, it drops the
    values of a branch that was computed; `add_branch` spares the work.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def draw(self, x: Tensor) -> Tensor | None:
        """The factor [B] of each sample's branch, 0 or 1 / (1 - drop_prob); None is 1 for all."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        return x.new_empty(x.shape[:1]).bernoulli_(keep_prob).div_(keep_prob)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.draw(x)
        return x if scale is None else x * scale.view(-1, *(1,) * (x.dim() - 1))

    def num_kept(self, batch: int) -> int:
        """How many of `batch` samples `add_branch` computes; `batch` at rates of 0.1 and below."""
        if not self.training or self.drop_prob <= MAX_RATE_COMPUTED:
            return batch
        return max(1, round(batch * (1.0 - self.drop_prob)))

    def add_branch(self, x: Tensor, source: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(source) for `num_kept` random samples, scaled to keep the expectation; x for
        the others, of which nothing is computed. x and source are [B, ...]."""
        batch = x.shape[0]
        kept = torch.randperm(batch, device=x.device)[: self.num_kept(batch)]
        added = branch(source.index_select(0, kept))
        dtype = torch.promote_types(x.dtype, added.dtype)
        return x.to(dtype).index_add(0, kept, added.to(dtype), alpha=batch / kept.shape[0])

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
