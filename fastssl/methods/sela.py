"""SeLA (Asano et al., 2020, arXiv:1911.05371) as SwAV compares with it (arXiv:2006.09882)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.losses.common import check_positive
from fastssl.methods.base import Setting
from fastssl.methods.clustering import ClusteringMethod, nearest
from fastssl.nn import SwAVPrototypes


class SeLA(ClusteringMethod):
    """Clusters of equal size of the whole dataset, around prototypes that are learned: see
    `ClusteringMethod`. At the end of an epoch, for each head::

        Q           = Sinkhorn-Knopp of memory @ prototypes.T / epsilon, over all samples
        assignments = argmax_k Q

    A rank holds the scores of its share of the samples meanwhile, N / W * K floats.

    epsilon, sinkhorn_iterations: of the assignment. The paper's lambda is 1 / epsilon, and it
        iterates until nothing changes.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(setting, "sela", **options)
        check_positive(epsilon=epsilon)
        check_int("sinkhorn_iterations", sinkhorn_iterations, 1)
        self.epsilon, self.sinkhorn_iterations = epsilon, sinkhorn_iterations
        self.prototypes = SwAVPrototypes(self.output_dim, self.num_heads * self.n_prototypes)
        self.prototypes.normalize_()

    def weight(self) -> Tensor:
        return self.prototypes.weight

    def after_step(self) -> None:
        self.prototypes.normalize_()
        super().after_step()

    def assign(self, epoch: int) -> None:
        bank, weight = self.memory.bank, self.weight()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        mine = bank[bank.any(dim=1)][collectives.rank() :: collectives.world_size()]
        heads = weight.chunk(self.num_heads)
        for prototypes, assignments in zip(heads, self.assignments, strict=True):
            log_u, _ = F.sinkhorn_knopp(
                linear(mine, prototypes),
                temperature=self.epsilon,
                num_iters=self.sinkhorn_iterations,
                materialize=False,
            )
            assignments.copy_(nearest(bank, prototypes, self.epsilon * log_u))
