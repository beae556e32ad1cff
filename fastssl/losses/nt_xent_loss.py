"""Contrast of two views of a batch (SimCLR: Chen et al. 2020, arXiv 2002.05709)."""

from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import Stats, check_positive, cross_entropy_stats, resolved


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy of 2 N samples, each against all others.

    temperature: SimCLR's are 0.1 for ImageNet and 0.5 for CIFAR. group, gather_distributed: whose
    batches are one batch, see `functional.nt_xent`; None is the default group,
    gather_distributed=False this process alone. The mean over ranks of the gradients is that of
    one process on the whole batch.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        gather_distributed: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.group = resolved(group, gather_distributed)

    def forward(
        self,
        z0: Tensor,  # [N, D], normalised inside
        z1: Tensor,  # [N, D]
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss; with return_stats also {"loss_over_log_k"}, K the candidates of a sample."""
        loss = F.nt_xent(z0, z1, temperature=self.temperature, group=self.group)
        if not return_stats:
            return loss
        candidates = 2 * z0.shape[0] * collectives.world_size(self.group) - 1
        return loss, cross_entropy_stats(loss, candidates)
