"""Alignment of predictions with targets (BYOL: Grill et al. 2020, arXiv 2006.07733; SimSiam: Chen &
He 2020, arXiv 2011.10566)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.kernels.common.checks import check_tensor
from fastssl.losses.common import check_not_swapped, check_positive


class NegativeCosineSimilarity(nn.Module):
    """-mean cos(x0, x1) along `dim`; BYOL's loss is 2 + 2 times this.

    x0 is the prediction, x1 the target, which both methods detach before they come here. eps bounds
    the lengths from below. The mean over ranks is that of one process on the whole batch.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        check_positive(eps=eps)
        self.dim = dim
        self.eps = eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        check_tensor("x0", x0)
        check_tensor("x1", x1, device=x0.device)
        if x0.shape != x1.shape:
            raise ValueError(f"x1 must have the shape of x0 {list(x0.shape)}, got {list(x1.shape)}")
        check_not_swapped("x0", x0, "x1", x1)
        # Near 1, half precision has few cosines.
        wide = torch.promote_types(x0.dtype, torch.float32)
        x0, x1 = x0.to(wide), x1.to(wide)
        return -F.cosine_similarity(x0, x1, dim=self.dim, eps=self.eps).mean()
