"""Spread of the features of a batch (Sablayrolles et al. 2019, arXiv 1806.03198)."""

from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_positive, resolved


class KoLeoLoss(nn.Module):
    """-mean log(distance to the nearest other row + eps) of rows of length 1.

    p: the norm of the distance; 2 is the only one. group: among whose rows neighbours are searched,
    None for the default group, as DINOv3 does; gather_distributed=False for this process alone, as
    DINOv2 does. The mean over ranks of the gradients is that of one process on the whole batch.
    """

    def __init__(
        self,
        p: int = 2,
        eps: float = 1e-8,
        *,
        gather_distributed: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        if p != 2:
            raise ValueError(f"p must be 2, got {p}")
        check_positive(eps=eps)
        self.eps = eps
        self.group = resolved(group, gather_distributed)

    def forward(self, student_output: Tensor) -> Tensor:  # [N, D], normalised inside
        return F.koleo(student_output, eps=self.eps, group=self.group)
