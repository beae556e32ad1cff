"""DINO (Caron et al., 2021, arXiv:2104.14294)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.data import Batch
from fastssl.losses import DINOLoss
from fastssl.methods.base import Setting
from fastssl.methods.common import check_views, encode, num_features
from fastssl.methods.self_distillation import Network, SelfDistillation, distill
from fastssl.methods.views import DINO as VIEWS
from fastssl.nn import DINOHead


class DINO(SelfDistillation):
    """Views of an image predict what the teacher makes of its first two::

        p[s] = softmax(student(view[s]) / student_temp)
        q[t] = softmax((teacher(view[t]) - center) / teacher_temp), t of the first two
        loss = mean over s != t and images of  -sum_k q[t] log p[s]

    The center is a running mean of the teacher's outputs, moved once per step.

    out_dim, hidden_dim, bottleneck_dim, norm_last_layer, use_bn_in_head: of the head; out_dim is
    the number of prototypes. norm_last_layer False learns better with small backbones, and
    schedules.last_layer_lr with hold_steps freezes the last layer at first.
    student_temp, center_momentum: as above.
    centering: "softmax", or "sinkhorn_knopp" in place of the center.
    fused_head: see `distill`. It saves memory, and time as well with many rows; stored logits are
    faster for a few hundred rows (images times views) or few prototypes.
    """

    views = VIEWS

    def __init__(
        self,
        setting: Setting,
        *,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        use_bn_in_head: bool = False,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: str = "softmax",
        fused_head: bool = True,
    ) -> None:
        super().__init__()
        check_views(setting, "dino", 2, at_least=True)
        head = DINOHead(
            num_features(setting),
            out_dim,
            use_bn_in_head,
            norm_last_layer,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
        )
        self.make_teacher(Network(setting.encoder, head))
        self.loss = DINOLoss(
            out_dim,
            setting.num_views,
            student_temp=student_temp,
            center_momentum=center_momentum,
            centering=centering,
            update_center=False,
        )
        self.fused_head = fused_head

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = encode(self.teacher.backbone, batch.views[:2])
        features = encode(self.student.backbone, batch.views)
        loss, stats = distill(
            self.loss,
            self.student.head,
            self.teacher.head,
            (features, targets),
            fused=self.fused_head,
            teacher_temp=self.teacher_temp,
        )
        return {"loss": loss, "features": targets, **stats}
