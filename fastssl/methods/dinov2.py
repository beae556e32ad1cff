"""DINOv2 (Oquab et al., 2023, arXiv:2304.07193)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastssl.data import Batch
from fastssl.losses import KoLeoLoss
from fastssl.methods.base import Setting
from fastssl.methods.ibot import iBOT
from fastssl.methods.views import DINOV2 as VIEWS
from fastssl.optim.schedules import Schedule

# Where DINOv2 is not iBOT.
DEFAULTS = {
    "out_dim": 65536,
    "patch_out_dim": 65536,
    "shared_head": False,
    "centering": "sinkhorn_knopp",
}


class DINOv2(iBOT):
    """iBOT with a head of its own for patches, Sinkhorn-Knopp and features that spread::

        loss = iBOT's + koleo_weight * sum over the first two views of KoLeo(student's class tokens)

    with KoLeo (Sablayrolles et al., 2019, arXiv:1806.03198) among the images of all processes.
    Keywords as for iBOT; centering "softmax" is what the smaller released models have. Registers,
    gates and stochastic depth are the encoder's: num_register_tokens, ffn_layer, drop_path_rate.
    """

    views = VIEWS
    schedules: ClassVar[Mapping[str, Schedule]] = {
        **iBOT.schedules,
        "teacher_momentum": Schedule(0.994, final=1.0),
    }

    def __init__(self, setting: Setting, *, koleo_weight: float = 0.1, **options: Any) -> None:
        super().__init__(setting, **{**DEFAULTS, **options})
        self.koleo = KoLeoLoss()
        self.koleo_weight = koleo_weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tokens = self.tokens(batch)
        outputs = self.losses(tokens)
        first, second = tokens.student[: 2 * len(batch)].chunk(2)
        koleo = self.koleo(first) + self.koleo(second)
        loss = outputs["loss"] + self.koleo_weight * koleo
        return {**outputs, "loss": loss, "koleo_loss": koleo.detach()}
