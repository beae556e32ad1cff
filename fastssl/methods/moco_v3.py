"""MoCo v3 (Chen et al., 2021, arXiv:2104.02057)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl.data import Batch
from fastssl.losses import InfoNCELoss
from fastssl.methods.base import Setting
from fastssl.methods.common import TeacherMethod, check_views, num_features
from fastssl.methods.views import BYOL
from fastssl.nn import MoCoPredictionHead, MoCoProjectionHead
from fastssl.optim.schedules import Schedule


class MoCoV3(TeacherMethod):
    """Each view's prediction finds the teacher's key of the other view among those of the batch::

        loss = 2 t (info_nce(q0, k1) + info_nce(q1, k0))        # t the temperature

    hidden_dim, output_dim, num_layers: of the projection, whose layers are 3 for a ViT and 2 for a
        ResNet. predictor_last_norm: whether the prediction is normalised over the batch; not for a
        ResNet.
    freeze_patch_embed: a ViT's patch embedding stays as it was initialised, which made the paper's
        training stable. ValueError for an encoder without `patch_embed`.
    """

    views = BYOL
    schedules: ClassVar[Mapping[str, Schedule]] = {"teacher_momentum": Schedule(0.99, final=1.0)}

    def __init__(
        self,
        setting: Setting,
        *,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        num_layers: int = 3,
        predictor_last_norm: bool = True,
        temperature: float = 0.2,
        freeze_patch_embed: bool = False,
    ) -> None:
        super().__init__()
        check_views(setting, "moco_v3", 2)
        encoder = setting.encoder
        if freeze_patch_embed:
            if not hasattr(encoder, "patch_embed"):
                raise ValueError(
                    "method.args.freeze_patch_embed must be False for an encoder without "
                    f"patch_embed, got True for a {type(encoder).__name__}"
                )
            encoder.patch_embed.requires_grad_(False)
        head = MoCoProjectionHead(num_features(setting), hidden_dim, output_dim, num_layers, True)
        self.make_teacher(nn.Sequential(OrderedDict(encoder=encoder, head=head)))
        self.predictor = MoCoPredictionHead(output_dim, hidden_dim, output_dim, predictor_last_norm)
        self.loss = InfoNCELoss(temperature)

    @property
    def model(self) -> nn.Module:
        return self.student.encoder

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        # View by view, so that each is normalised by statistics of its own.
        features = [self.model(view) for view in batch.views]
        q0, q1 = (self.predictor(self.student.head(one)) for one in features)
        with torch.no_grad():
            k0, k1 = (self.teacher(view) for view in batch.views)
        loss0, stats0 = self.loss(q0, k1, return_stats=True)
        loss1, stats1 = self.loss(q1, k0, return_stats=True)
        # The factor makes the best learning rate the same for all temperatures.
        loss = 2 * self.loss.temperature * (loss0 + loss1)
        stats = {name: (value + stats1[name]) / 2 for name, value in stats0.items()}
        return {"loss": loss, "features": torch.cat(features).detach(), **stats}
