"""Exemplar-CNN (Dosovitskiy et al., 2014, arXiv:1406.6909)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.data import Batch
from fastssl.kernels.common.checks import check_int
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, encode, num_features


class Exemplar(Method):
    """Every sample is a class of its own, whose members are its transformed views: cross-entropy of
    a linear classifier, meaned over views and images.

    num_classes: None is one per sample, D weights each; with fewer, samples share the class
        `index` modulo num_classes.
    """

    views = ({"jitter": 1.0, "saturation": 0.4, "grey": 0.1},)

    def __init__(self, setting: Setting, *, num_classes: int | None = None) -> None:
        super().__init__()
        check_views(setting, "exemplar", 1, at_least=True)
        if num_classes is None:
            num_classes = setting.num_samples
        check_int("method.args.num_classes", num_classes, 1)
        self.num_classes = num_classes
        self.model = setting.encoder
        self.head = nn.Linear(num_features(setting), num_classes)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = encode(self.model, batch.views)
        logits = self.head(features)
        classes = (batch.index % self.num_classes).repeat(len(batch.views))
        loss = nn.functional.cross_entropy(logits, classes)
        with torch.no_grad():
            accuracy = (logits.argmax(1) == classes).float().mean()
        return {"loss": loss, "features": features.detach(), "accuracy": accuracy}
