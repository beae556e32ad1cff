"""Barlow Twins (Zbontar et al., 2021, arXiv:2103.03230)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.data import Batch
from fastssl.losses import BarlowTwinsLoss
from fastssl.losses.common import check_positive
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, num_features
from fastssl.methods.views import BYOL as VIEWS
from fastssl.nn import BarlowTwinsProjectionHead


class BarlowTwins(Method):
    """The outputs of two views correlate dimension by dimension, and not between dimensions::

        C    = correlation of the columns of z[0] with those of z[1], over the batch of all ranks
        loss = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2

    Each view goes through the network by itself, since batch statistics are those of one view.

    hidden_dim, output_dim: of the projector.
    loss_scale: a factor of the loss. LARS cancels it for matrices, so that there it sets the rate
        of biases and norms beside theirs.
    """

    views = VIEWS

    def __init__(
        self,
        setting: Setting,
        *,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        lambd: float = 0.0051,
        loss_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(loss_scale=loss_scale)
        check_views(setting, "barlow_twins", 2)
        self.model = setting.encoder
        self.projector = BarlowTwinsProjectionHead(num_features(setting), hidden_dim, output_dim)
        self.loss, self.loss_scale = BarlowTwinsLoss(lambd), loss_scale

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = [self.model(view) for view in batch.views]
        z0, z1 = (self.projector(f) for f in features)
        loss = self.loss_scale * self.loss(z0, z1)
        return {"loss": loss, "features": torch.cat(features).detach()}
