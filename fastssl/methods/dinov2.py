"""DINOv2 (Oquab et al., 2023, arXiv:2304.07193)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fastssl.data import Batch
from fastssl.losses import KoLeoLoss
from fastssl.methods.base import Setting
from fastssl.methods.ibot import iBOT
from fastssl.methods.views import DINOV2 as VIEWS
from fastssl.optim.schedules import Schedule


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

    def __init__(
        self,
        setting: Setting,
        *,
        out_dim: int = 65536,
        patch_out_dim: int = 65536,
        shared_head: bool = False,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        mask_ratio: Sequence[float] = (0.1, 0.5),
        mask_probability: float = 0.5,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: str = "sinkhorn_knopp",
        fused_head: bool = True,
    ) -> None:
        super().__init__(
            setting,
            out_dim=out_dim,
            patch_out_dim=patch_out_dim,
            shared_head=shared_head,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            norm_last_layer=norm_last_layer,
            mask_ratio=mask_ratio,
            mask_probability=mask_probability,
            patch_weight=patch_weight,
            student_temp=student_temp,
            center_momentum=center_momentum,
            centering=centering,
            fused_head=fused_head,
        )
        self.koleo = KoLeoLoss()
        self.koleo_weight = koleo_weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        tokens = self.tokens(batch)
        outputs = self.losses(tokens)
        first, second = tokens.student[: 2 * len(batch)].chunk(2)
        koleo = self.koleo(first) + self.koleo(second)
        loss = outputs["loss"] + self.koleo_weight * koleo
        return {**outputs, "loss": loss, "koleo_loss": koleo.detach()}
