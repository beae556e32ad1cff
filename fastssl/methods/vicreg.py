"""VICReg (Bardes et al., 2022, arXiv:2105.04906)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.data import Batch
from fastssl.losses import VICRegLoss
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, num_features
from fastssl.methods.views import VICREG
from fastssl.nn import VICRegProjectionHead


class VICReg(Method):
    """Two views agree, no dimension of the output dies, and no two say the same::

        s(z, z') = mean over images of |z - z'|^2 / D
        v(z)     = mean_j max(0, 1 - sqrt(var(z_j) + epsilon))
        c(z)     = sum_{i != j} cov(z)_ij^2 / D
        loss     = sim_coeff * s(z[0], z[1]) + std_coeff * (v(z[0]) + v(z[1])) / 2
                   + cov_coeff * (c(z[0]) + c(z[1]))

    with variances and covariances over the batch of all ranks. The formulas of the paper divide
    neither s by D nor the variances by 2; its coefficients, which are the defaults here, were
    published with code that does. Each view goes through the network by itself, since batch
    statistics are those of one view.

    hidden_dim, output_dim, num_layers: of the expander.
    """

    views = VICREG

    def __init__(
        self,
        setting: Setting,
        *,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        num_layers: int = 3,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        epsilon: float = 1e-4,
    ) -> None:
        super().__init__()
        check_views(setting, "vicreg", 2)
        self.model = setting.encoder
        self.projector = VICRegProjectionHead(
            num_features(setting), hidden_dim, output_dim, num_layers
        )
        self.loss = VICRegLoss(sim_coeff, std_coeff, cov_coeff, epsilon)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = [self.model(view) for view in batch.views]
        z0, z1 = (self.projector(f) for f in features)
        return {"loss": self.loss(z0, z1), "features": torch.cat(features).detach()}
