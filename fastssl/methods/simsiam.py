"""SimSiam (Chen & He, 2020, arXiv:2011.10566)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.data import Batch
from fastssl.losses import NegativeCosineSimilarity
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, num_features
from fastssl.methods.views import MOCO_V2
from fastssl.nn import SimSiamPredictionHead, SimSiamProjectionHead


class SimSiam(Method):
    """The prediction from each of two views is the other's projection, which is held fixed::

        z    = projection(encoder(view)), p = predictor(z)
        loss = -cos(p[0], stop_gradient(z[1])) / 2 - cos(p[1], stop_gradient(z[0])) / 2

    meaned over images. Each view goes through the network by itself, since batch statistics are
    those of one view.

    hidden_dim: of the projector. predictor_dim: the predictor's bottleneck. output_dim: of both.
    """

    views = MOCO_V2

    def __init__(
        self,
        setting: Setting,
        *,
        hidden_dim: int = 2048,
        predictor_dim: int = 512,
        output_dim: int = 2048,
    ) -> None:
        super().__init__()
        check_views(setting, "simsiam", 2)
        self.model = setting.encoder
        self.projector = SimSiamProjectionHead(num_features(setting), hidden_dim, output_dim)
        self.predictor = SimSiamPredictionHead(output_dim, predictor_dim, output_dim)
        self.loss = NegativeCosineSimilarity()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = [self.model(view) for view in batch.views]
        z0, z1 = (self.projector(f) for f in features)
        p0, p1 = self.predictor(z0), self.predictor(z1)
        loss = (self.loss(p0, z1.detach()) + self.loss(p1, z0.detach())) / 2
        return {"loss": loss, "features": torch.cat(features).detach()}
