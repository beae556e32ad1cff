"""SimCLR (Chen et al., 2020, arXiv:2002.05709)."""

from __future__ import annotations

from torch import Tensor

from fastssl.data import Batch
from fastssl.losses import NTXentLoss
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, encode, num_features
from fastssl.methods.views import SIMCLR
from fastssl.nn import SimCLRProjectionHead


class SimCLR(Method):
    """Two views of an image are close, all other images of the batch far.

    hidden_dim, output_dim, num_layers: of the projection head. temperature: 0.1 is the paper's for
    ImageNet, 0.5 for CIFAR.
    """

    views = SIMCLR

    def __init__(
        self,
        setting: Setting,
        *,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        check_views(setting, "simclr", 2)
        self.model = setting.encoder
        self.head = SimCLRProjectionHead(num_features(setting), hidden_dim, output_dim, num_layers)
        self.loss = NTXentLoss(temperature)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = encode(self.model, batch.views)
        z0, z1 = self.head(features).chunk(2)
        loss, stats = self.loss(z0, z1, return_stats=True)
        return {"loss": loss, "features": features.detach(), **stats}
