"""Redundancy reduction between two views (Zbontar et al. 2021, arXiv 2103.03230)."""

from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import aliases, check_not_negative, resolved


class BarlowTwinsLoss(nn.Module):
    """sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2, C the correlation of two views' columns.

    lambd: the paper's 0.0051 (also lambda_param, lamb). group, gather_distributed: whose batches
    are one batch, see `functional.barlow_twins`; None is the default group,
    gather_distributed=False this process alone. The mean over ranks of the gradients is that of
    one process on the whole batch.
    """

    @aliases(lambda_param="lambd", lamb="lambd")
    def __init__(
        self, lambd: float = 0.0051, *, gather_distributed: bool = True, group: Group = None
    ) -> None:
        super().__init__()
        check_not_negative(lambd=lambd)
        self.lambd = lambd
        self.group = resolved(group, gather_distributed)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:  # [N, D] both
        return F.barlow_twins(z0, z1, lambd=self.lambd, group=self.group)
