"""BYOL (Grill et al., 2020, arXiv:2006.07733)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastssl.data import Batch
from fastssl.losses import NegativeCosineSimilarity
from fastssl.methods.base import Setting
from fastssl.methods.common import TeacherMethod, check_views, num_features
from fastssl.methods.views import BYOL as VIEWS
from fastssl.nn import BYOLPredictionHead, BYOLProjectionHead


class BYOL(TeacherMethod):
    """The student's prediction from each of two views is what a slow teacher makes of the other::

        z, t = student's and teacher's projection(encoder(view))
        loss = |p(z[0]) - t[1]|^2 + |p(z[1]) - t[0]|^2        # of unit vectors, meaned over images

    where |p - t|^2 = 2 - 2 cos(p, t), so that each term is 2 + 2 NegativeCosineSimilarity. Each
    view goes through the networks by itself, since batch statistics are those of one view. What is
    judged is the student's encoder.

    hidden_dim: of the projector and the predictor. output_dim: what is predicted.
    """

    views = VIEWS

    def __init__(self, setting: Setting, *, hidden_dim: int = 4096, output_dim: int = 256) -> None:
        super().__init__()
        check_views(setting, "byol", 2)
        width = num_features(setting)
        projector = BYOLProjectionHead(width, hidden_dim, output_dim)
        self.make_teacher(nn.Sequential(OrderedDict(encoder=setting.encoder, projector=projector)))
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.loss = NegativeCosineSimilarity()

    @property
    def model(self) -> nn.Module:
        return self.student.encoder

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = [self.model(view) for view in batch.views]
        p0, p1 = (self.predictor(self.student.projector(f)) for f in features)
        with torch.no_grad():
            t0, t1 = (self.teacher(view) for view in batch.views)
        loss = (2 + 2 * self.loss(p0, t1)) + (2 + 2 * self.loss(p1, t0))
        return {"loss": loss, "features": torch.cat(features).detach()}
