"""Variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv 2105.04906)."""

from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import aliases, check_not_negative, check_positive, resolved


class VICRegLoss(nn.Module):
    """sim_coeff * distance of the views + std_coeff * variance hinge + cov_coeff * covariance.

    Aliases: lambda_param, mu_param, nu_param for the coefficients, eps for epsilon, which is added
    to variances. group, gather_distributed: whose batches are one batch, see `functional.vicreg`
    for the terms; None is the default group, gather_distributed=False this process alone. The mean
    over ranks of the gradients is that of one process on the whole batch.
    """

    @aliases(lambda_param="sim_coeff", mu_param="std_coeff", nu_param="cov_coeff", eps="epsilon")
    def __init__(
        self,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        epsilon: float = 1e-4,
        *,
        gather_distributed: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        check_not_negative(sim_coeff=sim_coeff, std_coeff=std_coeff, cov_coeff=cov_coeff)
        check_positive(epsilon=epsilon)
        self.sim_coeff = sim_coeff
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff
        self.epsilon = epsilon
        self.group = resolved(group, gather_distributed)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:  # [N, D] both
        return F.vicreg(
            z0,
            z1,
            sim_coeff=self.sim_coeff,
            std_coeff=self.std_coeff,
            cov_coeff=self.cov_coeff,
            eps=self.epsilon,
            group=self.group,
        )
